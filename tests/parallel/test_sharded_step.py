"""One update on meshes of simulated devices against one device: loss, entropy, tokens and every gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig
from efx_jax.lora import Adapters, init_lora
from efx_jax.masks import pack_mask
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import batch_axes, tree_shardings
from efx_jax.training.state import TrainState, init_train_state
from efx_jax.training.step import StepOptions, Teacher, jit_step
from tests.tiers import few_of
from tests.tiny import EVEN

# Qwen3's norms of queries and keys with Qwen2's biases.
SPEC = dataclasses.replace(
    EVEN,
    model_type="qwen3",
    vocab_size=64,
    num_kv_heads=8,
    head_dim=8,
    biases=("q_proj", "k_proj", "v_proj"),
    qk_norm=True,
)
KEY = jax.random.key(3)
# The optimizer remembers the gradient as it is: Adam would blow up what is nearly zero.
TX = optax.trace(decay=0.0)
ROWS = 16
DROPOUT = 0.25
CASES: list[tuple[tuple[int, int, int], Any, Any]] = [
    ((2, 1, 1), "exact", "block"),
    ((4, 1, 1), "frozen", "linears"),
    ((8, 1, 1), "dense", "none"),
    ((1, 2, 1), "frozen", "block"),
    ((1, 4, 1), "ste", "linears"),
    ((1, 8, 1), "exact", "none"),
    ((1, 1, 2), "dense", "block"),
    ((1, 1, 4), "ste", "none"),
    ((1, 1, 8), "frozen", "linears"),
    ((2, 2, 2), "exact", "linears"),
]


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Weights, biases and norms that all matter."""
    leaves, tree = jax.tree.flatten(init_params(jax.random.key(0), SPEC))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.05 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def adapters(params: dict[str, Any]) -> Adapters:
    """In the middle of training: B is not zero."""
    fresh = init_lora(jax.random.key(2), params, SPEC, rank=3)
    lora_b = {
        name: 0.1 * jax.random.normal(jax.random.fold_in(KEY, index), leaf.shape)
        for index, (name, leaf) in enumerate(fresh.lora_b.items())
    }
    return dataclasses.replace(fresh, lora_b=lora_b)


@pytest.fixture(scope="module")
def masks(params: dict[str, Any]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(4)
    return {name: pack_mask(jnp.asarray(rng.random(params["layers"][name].shape) < 0.5)) for name in LINEARS}


def make_batch(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    tokens, targets = rng.integers(0, SPEC.vocab_size, (2, rows, 16)).astype(np.int32)
    lengths = rng.integers(4, 17, rows).astype(np.int32)
    real = np.arange(16) < lengths[:, None]
    weights = (real & (rng.random((rows, 16)) < 0.6)).astype(np.float32)
    return {"tokens": tokens, "targets": targets, "weights": weights, "lengths": lengths}


@pytest.fixture(scope="module")
def on_one_device(params: Any, adapters: Adapters, masks: Any) -> Any:
    """`on_one_device(options, rows)`: the state after one update and its metrics."""

    @functools.cache
    def step(chosen: StepOptions, rows: int) -> tuple[TrainState, dict[str, jax.Array]]:
        state = init_train_state(jax.tree.map(jnp.copy, adapters), TX)
        return jit_step()(state, params, masks, make_batch(rows), KEY, SPEC, TX, chosen)

    return step


def on_mesh(
    shape: tuple[int, int, int],
    chosen: StepOptions,
    rows: int,
    params: Any,
    adapters: Adapters,
    masks: Any,
    teacher: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    mesh = make_mesh(MeshConfig(*shape))
    # The step consumes its state, which may share its buffers with what it was copied from.
    state = init_train_state(jax.tree.map(jnp.copy, adapters), TX)
    placed = {"state": state, "params": params, "masks": masks, "teacher": {} if teacher is None else teacher}
    shardings = tree_shardings(mesh, placed)
    placed = jax.device_put(placed, shardings)
    split = batch_axes(rows, mesh.shape) or None
    batch = {
        name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(split, *(None,) * (leaf.ndim - 1))))
        for name, leaf in make_batch(rows).items()
    }
    pinned = (shardings["state"], NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        taught_by = None if teacher is None else Teacher(placed["teacher"], SPEC)
        step = jit_step(pinned)
        found = step(placed["state"], placed["params"], placed["masks"], batch, KEY, SPEC, TX, chosen, taught_by)
    assert jax.tree.map(lambda leaf: leaf.sharding, found[0]) == shardings["state"]
    return found


def assert_same_step(
    found: tuple[TrainState, dict[str, jax.Array]], expected: tuple[TrainState, dict[str, jax.Array]]
) -> None:
    for name, value in expected[1].items():
        np.testing.assert_allclose(float(found[1][name]), float(value), rtol=1e-5, err_msg=name)
    # optax.trace's memory is the gradient.
    for kind in ("lora_a", "lora_b"):
        for name in LINEARS:
            ours, theirs = (np.asarray(result[0].opt_state.trace[kind][name]) for result in (found, expected))
            assert np.abs(theirs).max() > 1e-3
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=f"gradient of {kind} of {name}"
            )


@pytest.mark.parametrize(("shape", "mode", "remat"), few_of(CASES, CASES[5], CASES[7], CASES[9]))
def test_a_step_on_a_mesh_is_that_of_one_device(
    shape: tuple[int, int, int],
    mode: Any,
    remat: Any,
    on_one_device: Any,
    params: Any,
    adapters: Adapters,
    masks: Any,
) -> None:
    """Two micro-batches with dropout."""
    chosen = StepOptions(mask_forward=mode, remat=remat, micro_batches=2, dropout_rate=DROPOUT)
    # What is computed again makes no difference on one device (tests/training), so that one reference serves.
    expected = on_one_device(dataclasses.replace(chosen, remat="none"), ROWS)
    assert_same_step(on_mesh(shape, chosen, ROWS, params, adapters, masks), expected)


def test_a_batch_that_no_axis_divides_is_computed_by_all(
    on_one_device: Any, params: Any, adapters: Adapters, masks: Any
) -> None:
    assert_same_step(on_mesh((2, 2, 1), StepOptions(), 3, params, adapters, masks), on_one_device(StepOptions(), 3))


@pytest.mark.parametrize(("shape", "rows"), [((2, 2, 2), 16), ((2, 2, 2), 8), ((2, 2, 1), 6)])
def test_a_teacher_reads_the_same_half_of_the_rows_on_a_mesh(
    shape: tuple[int, int, int], rows: int, params: Any, adapters: Adapters, masks: Any
) -> None:
    """In two micro-batches: a row for every device; for every other, so that all read; rows that no axis divides."""
    teacher = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    chosen = StepOptions(micro_batches=2, teacher_row_share=0.5, teacher_prefix_share=0.7, teacher_share=0.5)
    state = init_train_state(jax.tree.map(jnp.copy, adapters), TX)
    expected = jit_step()(state, params, masks, make_batch(rows), KEY, SPEC, TX, chosen, Teacher(teacher, SPEC))
    assert float(expected[1]["divergence"]) > 1e-3
    assert_same_step(on_mesh(shape, chosen, rows, params, adapters, masks, teacher), expected)
