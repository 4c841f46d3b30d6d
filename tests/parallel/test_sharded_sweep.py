"""SparseGPT's sweep on meshes of two and four devices against one device."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from efx_jax.config import MeshConfig, PruneConfig
from efx_jax.lora import init_lora
from efx_jax.model.spec import init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import tree_shardings
from efx_jax.pruning.blockwise import prune_event_blockwise
from efx_jax.pruning.selection import Counts
from efx_jax.pruning.sparsegpt import Sweep, inverse_factor, slab_counts, sparsegpt, sparsegpt_on_mesh
from tests.tiny import LLAMA

SHAPE = (16, 160)
# Linear, group, mesh: rows alone are split, columns too, and in both ways beside a copy of the model.
SWEEPS = [
    ("q_proj", "matrix", (1, 2, 2)),
    ("down_proj", "matrix", (1, 2, 2)),
    ("down_proj", "matrix", (2, 1, 2)),
    ("q_proj", "row", (2, 2, 1)),
    ("down_proj", "2:4", (1, 1, 2)),
]
SPEC = dataclasses.replace(LLAMA, vocab_size=64, intermediate_size=32)
# Split by rows alone, and by columns as well.
SOME = ("k_proj", "down_proj")
EVENTS = {
    "SparseGPT": PruneConfig(score="sparsegpt", group="matrix", recovery="obs", targets=SOME),
    "Wanda's mask, the update": PruneConfig(score="wanda", recovery="obs", sequential=True, targets=SOME),
}


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A weight of two slabs, among its entries many equal ones, and a Gram."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, SHAPE[1])).astype(np.float32)
    weight = rng.standard_normal(SHAPE).astype(np.float32)
    weight[:, ::3] = 0
    return weight, inputs.T @ inputs


@functools.cache
def on_one_device(group: str) -> Sweep:
    return jax.jit(sparsegpt, static_argnums=(2, 3))(*problem(), 0.5, group)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group", "shape"), SWEEPS)
def test_a_sweep_on_a_mesh_is_that_of_one_device(name: str, group: str, shape: tuple[int, int, int]) -> None:
    """A slab's selection goes over all rows, on whichever device they lie."""
    weight, gram = problem()

    def run(weight: jax.Array, gram: jax.Array, counts: Counts) -> Sweep:
        return sparsegpt_on_mesh(name, weight, inverse_factor(gram), counts, group)

    mesh = make_mesh(MeshConfig(*shape))
    sharding = tree_shardings(mesh, {name: weight})[name]
    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.device_put(weight, sharding), gram, slab_counts(SHAPE, 0.5, group))
    expected = on_one_device(group)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.weight, expected.weight, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.importance, expected.importance, rtol=1e-3, atol=1e-3)
    for array in found:
        assert array.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVENTS)
def test_an_event_on_a_mesh_is_that_of_one_device(case: str) -> None:
    config = EVENTS[case]
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim < 3 else 5 * leaf, init_params(jax.random.key(0), SPEC))
    adapters = init_lora(jax.random.key(1), params, SPEC, rank=2)
    tokens = np.random.default_rng(3).integers(0, SPEC.vocab_size, (2, 32, 16)).astype(np.int32)
    batches = [{"tokens": part, "lengths": np.full(32, 16, np.int32)} for part in tokens]

    def event(params: Any, adapters: Any) -> Any:
        return prune_event_blockwise(params, adapters, None, batches, None, SPEC, config)

    expected = event(params, adapters)
    mesh = make_mesh(MeshConfig(1, 2, 2))
    tree = {"params": params, "adapters": adapters}
    placed = jax.device_put(tree, tree_shardings(mesh, tree))
    with jax.set_mesh(mesh):
        found = event(placed["params"], placed["adapters"])
    differing = sum(int(np.sum(np.asarray(found[2][name] != expected[2][name]))) for name in SOME)
    assert differing <= 1e-3 * sum(expected[2][name].size for name in SOME)
    for name in SOME:
        ours, theirs = np.asarray(found[0]["layers"][name]), np.asarray(expected[0]["layers"][name])
        # A row's later entries depend on its earlier ones.
        rows = (np.asarray(found[2][name]) == np.asarray(expected[2][name])).all(axis=-1)
        np.testing.assert_allclose(ours[rows], theirs[rows], rtol=0, atol=1e-4 * np.abs(theirs).max(), err_msg=name)
        assert found[0]["layers"][name].sharding.is_equivalent_to(placed["params"]["layers"][name].sharding, 3)
