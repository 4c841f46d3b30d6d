"""Where every array lies, by its name."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efx_jax.config import MeshConfig, PruneConfig, TrainConfig
from efx_jax.lora import init_lora
from efx_jax.masks import packed_shape
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import (
    batch_axes,
    block_on_host,
    constrain,
    constrain_tree,
    split_rows,
    to_device,
    to_host,
    tree_shardings,
)
from efx_jax.pruning.average import init_prune_state
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import init_train_state
from tests.tiny import EVEN

SPEC = dataclasses.replace(
    EVEN,
    model_type="qwen3",
    vocab_size=64,
    num_kv_heads=8,
    head_dim=8,
    tie_word_embeddings=False,
    biases=("q_proj", "k_proj", "v_proj", "o_proj"),
    qk_norm=True,
)
OUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
IN = ("o_proj", "down_proj")
ROWS = ("tensor", "fsdp")


def specs_of(tree: Any) -> dict[str, P]:
    """Path of every leaf -> its partition."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = tree_shardings(mesh, tree)
    assert jax.tree.structure(shardings) == jax.tree.structure(tree)
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec for path, leaf in leaves}


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.eval_shape(functools.partial(init_params, spec=SPEC), jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(params: Any) -> Any:
    return jax.eval_shape(lambda key: init_lora(key, params, SPEC, rank=3), jax.random.key(0))


def test_matrices_vocabulary_biases_and_norms(params: Any) -> None:
    expected = {f"layers/{name}": P(None, ROWS, None) for name in OUT}
    expected |= {f"layers/{name}": P(None, ("fsdp",), ("tensor",)) for name in IN}
    expected |= {f"layers/{name}_bias": P(None, "tensor") for name in ("q_proj", "k_proj", "v_proj")}
    expected |= {"layers/o_proj_bias": P(None, None), "embed_tokens": P(ROWS, None), "lm_head": P(ROWS, None)}
    norms = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
    expected |= {"norm": P()} | {f"layers/{name}": P() for name in norms}
    assert specs_of(params) == expected


def test_masks_lie_as_their_matrices(params: Any) -> None:
    masks = {name: packed_shape(params["layers"][name].shape) for name in LINEARS}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    found = tree_shardings(mesh, {"masks": masks})["masks"]
    assert found == tree_shardings(mesh, {name: params["layers"][name] for name in LINEARS})


def test_adapters_and_both_moments_lie_with_their_matrices(adapters: Any) -> None:
    state = jax.eval_shape(lambda a: init_train_state(a, optimizer(TrainConfig(), 10)), adapters)
    found = specs_of(state)
    for prefix in ("adapters", "opt_state/1/0/mu", "opt_state/1/0/nu"):
        for name in LINEARS:
            inputs, outputs = (("tensor",), ("fsdp",)) if name in IN else (None, ROWS)
            assert found.pop(f"{prefix}/lora_a/{name}") == P(None, None, inputs)
            assert found.pop(f"{prefix}/lora_b/{name}") == P(None, outputs, None)
    # What is left are counters.
    assert set(found.values()) == {P()} and "step" in found


def test_the_memory_of_the_average_lies_with_its_matrices(params: Any, adapters: Any) -> None:
    config = PruneConfig(ema=0.5, recovery="pbs")
    state = jax.eval_shape(lambda key: init_prune_state(params, adapters, config, key, 3), jax.random.key(0))
    found = specs_of(state)
    for name in LINEARS:
        inputs, outputs = (("tensor",), ("fsdp",)) if name in IN else (None, ROWS)
        assert found.pop(f"snapshots/lora_a/{name}") == P(None, None, None, inputs)
        assert found.pop(f"snapshots/lora_b/{name}") == P(None, None, outputs, None)
        assert found.pop(f"snapshots/reach/{name}") == P(None, None, outputs)
    for source in ("attn_in", "o_in", "mlp_in", "down_in"):
        assert found.pop(f"snapshots/input_norm/{source}") == P()
    assert set(found) == {"event", "key"} and set(found.values()) == {P()}


def test_averages_themselves_lie_as_blocks_of_their_matrices() -> None:
    blocks = {"score": {"q_proj": (jnp.zeros((64, 32)),) * 2, "o_proj": (jnp.zeros((32, 64)),) * 2, "k_proj": ()}}
    assert specs_of(blocks) == {
        "score/q_proj/0": P(ROWS, None),
        "score/q_proj/1": P(ROWS, None),
        "score/o_proj/0": P(("fsdp",), ("tensor",)),
        "score/o_proj/1": P(("fsdp",), ("tensor",)),
    }


@pytest.mark.parametrize(
    ("rows", "axes"), [(8, ("data", "fsdp")), (6, ("data",)), (4, ("data",)), (12, ("data",)), (16, ("data", "fsdp"))]
)
def test_a_batch_is_split_over_what_divides_it(rows: int, axes: tuple[str, ...]) -> None:
    assert batch_axes(rows, {"data": 2, "fsdp": 4, "tensor": 3}) == axes


def test_a_batch_falls_back_to_fsdp_alone_and_then_to_nothing() -> None:
    assert batch_axes(6, {"data": 4, "fsdp": 3, "tensor": 1}) == ("fsdp",)
    assert batch_axes(7, {"data": 2, "fsdp": 4, "tensor": 1}) == ()


def test_an_array_waits_in_the_hosts_memory_and_comes_back() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for rows, own in ((4, ("fsdp", "data")), (2, ("fsdp",))):
        values = np.arange(8.0 * rows, dtype=np.float32).reshape(rows, 8)
        array = jax.device_put(values, NamedSharding(mesh, P(("fsdp",), ("tensor",))))
        waiting = to_host(array)
        assert waiting.sharding == NamedSharding(mesh, P(own, ("tensor",)), memory_kind="pinned_host")
        expected = block_on_host(jax.device_put(values[None], NamedSharding(mesh, P(None, ("fsdp",), ("tensor",)))))
        assert (expected.shape, expected.sharding) == (waiting.shape, waiting.sharding)
        back = to_device(waiting)
        assert back.sharding == array.sharding
        np.testing.assert_array_equal(back, values)


def test_without_a_mesh_nothing_is_laid_out() -> None:
    array = jnp.ones((4, 8))
    tree = {"layers": {"q_proj": array}}
    assert constrain(array, "tensor", None) is array and constrain_tree(tree) is tree


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 1, 8), (4, 2, 1)])
@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_rows_that_are_shared_out_come_back_in_place(shape: tuple[int, int, int], name: str) -> None:
    """Every row with all its columns, whatever splits them; results as wide as the matrix and as narrow as B."""
    rng = np.random.default_rng(0)
    matrix, whole = (jnp.asarray(rng.standard_normal(dims), jnp.float32) for dims in ((16, 32), (3, 32)))

    def function(rows: jax.Array, whole: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rows * rows.sum(axis=1, keepdims=True), jnp.einsum("oi,ri->or", rows, whole)

    expected = function(matrix, whole)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        placed = jax.device_put(matrix, tree_shardings(mesh, {name: matrix})[name])
        found = jax.jit(lambda m, w: split_rows(function, name, (m,), (w,)))(placed, whole)
    assert found[0].sharding.is_equivalent_to(placed.sharding, 2)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
