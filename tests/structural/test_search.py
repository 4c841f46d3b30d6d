"""ATP's steps in a run: what searches when, what the adapters learn under, and what is left when it ends."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig
from efx_jax.model.decoder import forward
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import BATCH
from efx_jax.pruning.average import PruneState
from efx_jax.structural.slicing import parameter_count
from efx_jax.structural.units import kept_fraction
from efx_jax.training.search import Search, cut_out, cut_report, end_search, fresh_units, masked_base, search_step
from efx_jax.training.state import RunState, init_train_state
from efx_jax.training.step import StepOptions

KEYS = jax.random.split(jax.random.key(5), 4)
MESH = make_mesh(MeshConfig())
logits = jax.jit(forward, static_argnames="spec")


def start(tiny: Any, space: Any, end: int = 1, ratio: float = 0.4, mesh: Any = MESH) -> tuple[Search, RunState]:
    """A run before its first update, its generator's units undecided."""
    rng = np.random.default_rng(9)
    batch = {"tokens": tiny.tokens, "targets": rng.integers(0, 31, tiny.tokens.shape)}
    batch |= {"weights": np.ones(tiny.tokens.shape, np.float32), "lengths": np.full(len(tiny.tokens), 9, np.int32)}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(BATCH)))
    rate = optax.constant_schedule(1e-2)
    search = Search(
        tiny.spec,
        space,
        ratio,
        end,
        steps=4,
        # Adam would make full steps of the rounding where a gradient is next to nothing.
        generator_tx=optax.sgd(1e-1),
        adapter_tx=optax.sgd(rate),
        learning_rate=rate,
        first_key=KEYS[0],
        noise_key=KEYS[1],
        mask_key=KEYS[2],
        dropout_key=KEYS[3],
        other_batch=lambda number: batch,
        options_of=lambda batch: StepOptions(mask_forward="frozen"),
    )
    units = fresh_units(search, mesh)
    weights = units.generator.generator.weights
    undecided = {kind: 8 * leaf for kind, leaf in weights["units"].items()}
    generator = units.generator.generator.replace(weights=weights | {"units": undecided})
    units = units.replace(generator=units.generator.replace(generator=generator))
    train = init_train_state(jax.tree.map(jnp.copy, tiny.adapters), search.adapter_tx)
    train, params = jax.device_put((train, tiny.params), NamedSharding(mesh, PartitionSpec()))
    prune = PruneState(jnp.int32(0), {}, {}, jax.random.key(0))
    return search, RunState(train, params, {}, prune, units)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["paper", "sliceable"])
def test_the_model_that_is_cut_computes_what_the_masked_one_does(space: str, make_tiny: Callable) -> None:
    """Biases included, which no mask of weights reaches."""
    tiny = make_tiny("qwen2")
    search, state = start(tiny, space)
    params, masks = masked_base(search, state)
    whole = logits(params, tiny.tokens, tiny.spec, tiny.adapters, masks)
    np.testing.assert_array_equal(whole, logits(tiny.params, tiny.tokens, tiny.spec, tiny.adapters, masks))
    state = end_search(search, state, MESH)
    params, masks = masked_base(search, state)
    expected = logits(params, tiny.tokens, tiny.spec, tiny.adapters, masks)
    smaller, spec = cut_out(state, tiny.spec, space)
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(logits(smaller, tiny.tokens, spec), expected, atol=1e-5 * scale, rtol=0)
    assert float(jnp.max(jnp.abs(whole - expected))) > 0.1 * scale
    found = cut_report(state, tiny.spec, space)
    assert found["removed"] == pytest.approx(1 - float(kept_fraction(state.units.masks, tiny.spec, space)))
    assert 0.4 <= found["removed"] + 1e-6 < 0.5
    assert found["parameters"]["written"] == sum(leaf.size for leaf in jax.tree.leaves(smaller))
    assert found["parameters"]["before"] == parameter_count(tiny.spec)
    assert found["parameters"]["kept"] <= found["parameters"]["written"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_devices_learn_what_one_does(make_tiny: Callable) -> None:
    tiny = make_tiny("llama")
    found = []
    for config in (MeshConfig(), MeshConfig(data=2)):
        mesh = make_mesh(config)
        with jax.set_mesh(mesh):
            search, state = start(tiny, "sliceable", mesh=mesh)
            state, metrics = search_step(search, state, search.other_batch(0))
            state = end_search(search, state, mesh)
            state, later = search_step(search, state, search.other_batch(1))
            found.append(jax.device_get((state.train, state.units, metrics, later)))
        # The generator has learned once, the adapters twice; the base has not moved, and no mask is kept twice.
        assert (int(state.units.generator.step), int(state.train.step)) == (1, 2)
        assert ("generator_loss" in metrics, "generator_loss" in later) == (True, False)
        assert float(later["sparsity"]) == pytest.approx(cut_report(state, tiny.spec, "sliceable")["removed"])
        jax.tree.map(np.testing.assert_array_equal, state.params, tiny.params)
        assert state.masks == {}
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_every_unit_stays_until_the_search_ends_and_another_key_begins_it_elsewhere(make_tiny: Callable) -> None:
    tiny = make_tiny("llama")
    search, state = start(tiny, "sliceable")
    assert all(bool(mask.all()) for mask in state.units.masks.values())
    other = dataclasses.replace(search, first_key=KEYS[3])
    first, second = (fresh_units(each, MESH).generator.generator for each in (search, other))
    assert float(jnp.max(jnp.abs(first.embeddings - second.embeddings))) > 1e-2
