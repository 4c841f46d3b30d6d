"""Attention against loops and explicit masks, on one device and on eight; cuDNN's by its lowering and its self-test."""

import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig
from efx_jax.model import cudnn_attention
from efx_jax.model.attention import attention, choose_attention, masked_attention, visible_keys
from efx_jax.model.cudnn_attention import segment_runs
from efx_jax.model.spec import spec_from_config
from efx_jax.parallel.mesh import make_mesh
from tests.quick import quick_compilation
from tests.tiers import few_of

Array = jax.Array
PACKED = [1] * 40 + [2] * 61 + [3] * 30 + [-1] * 19
# A trunk of 50 that two branches share, the first of which forks, then padding.
TREE = [135] * 50 + [95] * 20 + [80] * 10 + [95] * 15 + [135] * 40 + list(range(136, 151))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operands(batch: int, length: int, heads: int, kv_heads: int, width: int, dtype: str = "float32") -> list[Array]:
    """q, k, v and a cotangent of the output."""
    shapes = [(batch, length, count, width) for count in (heads, kv_heads, kv_heads)]
    drawn = [jnp.asarray(normal(seed, *shape), dtype) for seed, shape in enumerate(shapes)]
    return [*drawn, jnp.asarray(normal(3, batch, length, heads * width))]


def output_and_gradients(attend: Callable[..., Array], q: Array, k: Array, v: Array, d_out: Array) -> list[np.ndarray]:
    @jax.jit
    def run(q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return [np.asarray(array, np.float32) for array in run(q, k, v, d_out)]


def by_mask(segments: Array | None, ends: Array | None, length: int) -> Callable[[Array, Array, Array], Array]:
    return lambda q, k, v: masked_attention(q, *cached(k, v), visible_keys(segments, 0, length, ends))


def cached(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values `[B,S,K,H]` as a cache has them."""
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


def test_without_segments_a_query_sees_itself_and_all_before() -> None:
    np.testing.assert_array_equal(visible_keys(None, 0, 4)[0], np.tri(4, dtype=bool))
    np.testing.assert_array_equal(visible_keys(None, 2, 4)[0], np.tri(4, dtype=bool)[2:])


@pytest.mark.parametrize(
    "row",
    [
        [1, 1, 2, 2, 2, 3, -1, -1],  # packing, then padding
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 2, 1, 0, 2, 0, 1, -1],  # in any order
    ],
)
def test_a_query_sees_earlier_keys_of_its_own_segment(row: list[int]) -> None:
    segments = np.asarray([row, row[::-1]])
    found = np.asarray(visible_keys(jnp.asarray(segments), 0, len(row)))
    for batch, query, key in itertools.product(range(2), range(len(row)), range(len(row))):
        theirs, own = segments[batch, key], segments[batch, query]
        assert found[batch, query, key] == (key <= query and theirs == own)


def test_in_a_tree_a_query_sees_itself_and_its_ancestors() -> None:
    parents = [-1, 0, 1, 1, 3, 0, 5, -1]
    ends = jnp.asarray([[7, 5, 3, 5, 5, 7, 7, 8]])
    found = np.asarray(visible_keys(None, 0, 8, ends))[0]
    for query in range(8):
        ancestors, node = set(), query
        while node >= 0:
            ancestors.add(node)
            node = parents[node]
        assert set(np.flatnonzero(found[query])) == ancestors
    np.testing.assert_array_equal(np.asarray(visible_keys(None, 3, 6, ends))[0], found[3:6, :6])


@pytest.mark.parametrize("length", [5, 70])
def test_attention_equals_a_loop_over_heads_and_queries(length: int) -> None:
    q, k, v, _ = (np.asarray(array) for array in operands(2, length, 6, 2, 4))
    found = np.asarray(attention(q, k, v)).reshape(q.shape)
    for b, t, n in itertools.product(range(2), range(length), range(6)):
        keys, values = k[b, : t + 1, n // 3], v[b, : t + 1, n // 3]
        weights = np.exp(keys @ q[b, t, n] / math.sqrt(4))
        np.testing.assert_allclose(found[b, t, n], weights @ values / weights.sum(), atol=1e-6)


@pytest.mark.parametrize("layout", ["plain", "packed", "tree"])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_attention_and_its_gradients_equal_those_of_an_explicit_mask(layout: str, length: int) -> None:
    case = operands(2, length, 6, 2, 8)
    segments = jnp.asarray([PACKED[:length], ([1] * 20 + PACKED)[:length]]) if layout == "packed" else None
    ends = jnp.asarray([TREE[:length], [length] * length]) if layout == "tree" else None
    found = output_and_gradients(lambda q, k, v: attention(q, k, v, segments, ends=ends), *case)
    for array, expected in zip(found, output_and_gradients(by_mask(segments, ends, length), *case), strict=True):
        np.testing.assert_allclose(array, expected, atol=2e-6 * max(1.0, np.abs(expected).max()))


def test_half_precision_operands_cost_their_own_rounding_only() -> None:
    case, exact = operands(2, 150, 6, 2, 16, "bfloat16"), operands(2, 150, 6, 2, 16)
    rounded = [array.astype("float32") for array in case[:3]]
    found = output_and_gradients(attention, *case)
    for array, expected in zip(found, output_and_gradients(attention, *rounded, exact[3]), strict=True):
        assert np.linalg.norm(array - expected) < 0.006 * np.linalg.norm(expected)


def test_large_scores_stay_finite() -> None:
    q, k, v, d_out = operands(1, 70, 2, 1, 8)
    for array in output_and_gradients(attention, 1e4 * q, k, v, d_out):
        assert np.isfinite(array).all()


def test_no_array_of_all_scores_exists_and_future_keys_cost_nothing() -> None:
    q, k, v, d_out = operands(1, 512, 2, 1, 8)
    traced = jax.make_jaxpr(lambda *case: jax.vjp(attention, *case)[1](d_out))(q, k, v)
    shapes = [variable.aval.shape for equation in _equations(traced.jaxpr) for variable in equation.outvars]
    assert max(math.prod(shape) for shape in shapes) <= 2 * 64 * 512
    products = [e for e in _equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 8 * (2 + 5)
    scores = [e.outvars[0].aval.shape[-1] for e in products[:16:2]]
    assert scores == list(range(64, 513, 64))


def _equations(jaxpr: Any) -> list[Any]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += _equations(inner) if hasattr(inner, "eqns") else []
    return found


def test_the_log_sums_saved_by_name_spare_the_backward_pass_the_forward_one() -> None:
    q, k, v, _ = operands(1, 64, 2, 1, 8)

    def products(policy: Any) -> int:
        loss = jax.checkpoint(lambda *case: jnp.sum(attention(*case)), policy=policy)
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v)).count("dot_general")

    policies = jax.checkpoint_policies
    named = products(policies.save_only_these_names("attention_log_sums"))
    assert named == 2 + 5
    assert products(policies.nothing_saveable) > named


@pytest.mark.parametrize(("data", "tensor"), few_of([(8, 1), (1, 8), (4, 2), (2, 4)], (1, 8), (4, 2)))
def test_eight_devices_equal_one(data: int, tensor: int) -> None:
    """Batch over `data`, heads over `tensor`, no weight of a score on another device."""
    q, k, v, d_out = operands(8, 150, 16, 8, 8)
    segments, ends = jnp.asarray([PACKED, [1] * 150] * 4), jnp.asarray([[150] * 150, TREE] * 4)

    def run(*case: Array) -> list[Array]:
        *inputs, d_out, segments, ends = case
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, ends=ends), *inputs)
        return [out, *pull(d_out)]

    expected = jax.jit(run)(q, k, v, d_out, segments, ends)
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(data, tensor), ("data", "tensor"))
    specs = [PartitionSpec("data", None, "tensor")] * 4 + [PartitionSpec("data")] * 2
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    placed = [jax.device_put(x, s) for x, s in zip((q, k, v, d_out, segments, ends), shardings, strict=True)]
    compiled = jax.jit(run, out_shardings=[shardings[3], *shardings[:3]]).lower(*placed).compile()
    for found, reference in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(found, reference, atol=2e-6 * np.abs(reference).max())
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", compiled.as_text())


def test_a_query_that_sees_nothing_stays_finite() -> None:
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 3, 1, 4), normal(2, 1, 3, 1, 4)
    visible = np.asarray([[[False, False, False], [True, False, True]]])
    out = np.asarray(masked_attention(q, *cached(k, v), visible)).reshape(2, 2, 4)
    np.testing.assert_allclose(out[0], np.tile(v[0, :, 0].mean(0), (2, 1)), rtol=1e-5)


def test_runs_of_packed_segments_start_where_the_last_one_ends() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, -1, -1], [1] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [-1] * 8])
    starts, lengths, fits = segment_runs(segments, 4)
    np.testing.assert_array_equal(starts[:2], [[0, 3, 4, 6, -1], [0, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths[:2], [[3, 1, 2, 2], [8, -1, -1, -1]])
    np.testing.assert_array_equal(fits, [True, True, False, True])
    assert starts.dtype == lengths.dtype == jnp.int32


@pytest.mark.parametrize("row", [[0, 0, 1, 1], [1, 2, 1, 1], [-1, 1, 1, 1], [2, 2, 1, -1]])
def test_rows_that_the_ragged_layout_cannot_say_are_told(row: list[int]) -> None:
    assert not segment_runs(jnp.asarray([row]), 4)[2][0]


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_cudnn_attention_lowers_for_cuda_without_a_mask_tensor(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """All that jax asks a device or its libraries for is answered here: cuDNN's version and the compute capability."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    q, k, v, d_out = operands(2, 256, 8, 2, 128, "bfloat16")
    segments = None if layout == "plain" else jnp.asarray([[1] * 100 + [2] * 140 + [-1] * 16, [1] * 256])

    def gradients(q: Array, k: Array, v: Array) -> Any:
        return jax.vjp(lambda *case: attention(*case, segments, "cudnn"), q, k, v)[1](d_out)

    text = jax.jit(gradients).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    assert ("PADDING_CAUSAL" in text) == (layout == "packed") and "CAUSAL" in text
    assert "256x256" not in text


SPEC = spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


def right(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    return attention(q, k, v, segments).reshape(q.shape).astype(q.dtype)


def uncausal(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    everything = jnp.ones((1, q.shape[1], q.shape[1]), bool)
    return masked_attention(q, *cached(k, v), everything).reshape(q.shape).astype(q.dtype)


def with_nan_gradients(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    nothing = 0 * k.sum()
    return right(q, k, v, segments) + jnp.sqrt(nothing * nothing)


def with_wrong_dv(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    return right(q, k, jax.lax.stop_gradient(v) + 0.9 * (v - jax.lax.stop_gradient(v)), segments)


def refusing(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    raise NotImplementedError("needs a newer GPU\nand a second line")


def blind_to_segments(q: Array, k: Array, v: Array, segments: Array) -> Array:
    return right(q, k, v)


def choose(
    monkeypatch: pytest.MonkeyPatch,
    plain: Any,
    ragged: Any,
    dtype: str = "bfloat16",
    packed: tuple[int, int] = (2, 256),
) -> tuple[str, list[str]]:
    """The choice for a packed run on a pretended GPU, and the warnings."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn_attention, "causal", plain)
    monkeypatch.setattr(cudnn_attention, "packed", ragged)
    monkeypatch.setattr(cudnn_attention, "packed_here", ragged)
    with quick_compilation(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = choose_attention(SPEC, dtype, packed=packed)
    return choice, [str(warning.message) for warning in caught]


def test_cudnn_that_agrees_is_taken_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, right, right) == ("cudnn", [])


@pytest.mark.parametrize(
    ("plain", "packed", "reason"),
    [
        (uncausal, right, "plain rows: output differs from XLA's by"),
        (with_wrong_dv, right, "plain rows: dv differs from XLA's by"),
        (with_nan_gradients, right, "plain rows: dk is not finite"),
        (refusing, right, "plain rows: NotImplementedError: needs a newer GPU"),
        (right, blind_to_segments, "packed rows: output differs"),
        (right, refusing, "packed rows: NotImplementedError"),
    ],
)
def test_cudnn_that_fails_its_self_test_is_left_with_one_loud_line(
    monkeypatch: pytest.MonkeyPatch, plain: Any, packed: Any, reason: str
) -> None:
    choice, (line,) = choose(monkeypatch, plain, packed)
    assert choice == "xla"
    assert "cuDNN flash attention is NOT used" in line and reason in line and "\n" not in line


def greedy(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """Right, and with 64 bytes a pair of tokens beside it: 4 MiB in the self-test."""
    pairs = jnp.sort(jnp.outer(jnp.arange(16 * q.shape[1]), q[0, :, 0, 0].astype(jnp.float32)), axis=0)
    return right(q, k, v, segments) + 1e-9 * jnp.mean(pairs)


def test_packed_rows_that_need_more_workspace_than_scores_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, right, greedy) == ("cudnn", [])
    choice, (line,) = choose(monkeypatch, right, greedy, packed=(1, 8192))
    assert choice == "xla"
    assert "packed rows: 1 x 8192 tokens need" in line and "GiB of workspace, XLA's path" in line


def greedy_by_row(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """As `greedy`, for each of its rows: 0.6 GiB a row of 4,096 tokens, which one row may have and eight may not."""
    pairs = jnp.sort(jnp.outer(jnp.arange(q.shape[0] * q.shape[1]), q[0, :, 0, 0].astype(jnp.float32)), axis=0)
    return right(q, k, v, segments) + 1e-9 * jnp.mean(pairs)


def test_on_a_mesh_a_device_is_asked_for_all_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn_attention, "causal", right)
    monkeypatch.setattr(cudnn_attention, "packed_here", greedy_by_row)
    with jax.set_mesh(make_mesh(MeshConfig(data=8))), quick_compilation():
        assert choose_attention(SPEC, "bfloat16", packed=(1, 4096)) == "cudnn"
        with pytest.warns(RuntimeWarning, match="packed rows: 8 x 4096 tokens need"):
            assert choose_attention(SPEC, "bfloat16", packed=(8, 4096)) == "xla"


def test_cudnn_that_refuses_the_runs_own_rows_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return right(q, k, v, segments) if q.shape[1] <= 256 else refusing(q, k, v)

    choice, (line,) = choose(monkeypatch, right, short, packed=(1, 512))
    assert choice == "xla" and "packed rows of 512 tokens: NotImplementedError: needs a newer GPU" in line


def test_float32_runs_on_xla_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, (line,) = choose(monkeypatch, right, right, "float32")
    assert choice == "xla" and "the compute dtype is float32" in line


def test_rows_of_one_sequence_do_not_ask_for_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn_attention, "causal", right)
    monkeypatch.setattr(cudnn_attention, "packed", refusing)
    with quick_compilation():
        assert choose_attention(SPEC, "float16") == "cudnn"


def test_a_machine_without_cudnn_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("this machine may have cuDNN")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(RuntimeWarning, match="NOT used.*cuDNN is not detected"):
        assert choose_attention(SPEC, "bfloat16") == "xla"


def test_on_a_cpu_the_choice_is_xla_in_silence() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_attention(SPEC, "bfloat16", packed=(2, 256)) == "xla"
