"""Softmax attention with grouped queries: causal, in plain XLA or by cuDNN, and with an explicit mask for decoding."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from efx_jax.einsum import dot
from efx_jax.model import cudnn_attention
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.mesh import active_mesh

Array = jax.Array
Implementation = Literal["xla", "cudnn"]
# q, k, v, segments, ends, log-sum-exp of every query.
_Saved = tuple[Array, Array, Array, Array | None, Array | None, Array]

_BLOCKS, _SMALLEST_BLOCK = 8, 64  # measured on a CPU at 512 and 2,048 tokens; more blocks take longer to compile
_TOLERANCE = 0.02  # of the norm; two correct implementations differ by half a percent in bfloat16
_WORKSPACE = 2**30  # bytes; a smaller workspace does not justify the slower path
_SIZES = ((100, 60, 70, 26), (128, 128, 0, 0))  # segments and padding of the self-test's rows


def attention(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None = None,
    implementation: Implementation = "xla",
    ends: Array | None = None,
) -> Array:
    """Causal softmax attention, as used in training, evaluation and calibration.

    A query sees itself and earlier keys; with segments only those of its own segment, with ends only those that have
    not ended. Ends describe a tree of sequences in pre-order, whose tokens see the path from the root to themselves.
    Right-padded batches need neither: a real token never sees the padding behind it.

    Args:
        q: `[B,T,N,H]`, in the dtype of the matmul operands.
        k: `[B,T,K,H]`, N a multiple of K.
        v: `[B,T,K,H]`.
        segments: int `[B,T]`, -1 on padding, or None.
        implementation: "xla" takes anything; "cudnn" takes bfloat16 or float16 on NVIDIA GPUs, also in packed rows, see
            `choose_attention`. For cuDNN a row's segments must ascend from 1, padding last, and be at most
            `cudnn_attention.MAX_RUNS`; a row laid out otherwise comes out as NaN.
        ends: int `[B,T]`, or None: one past the last position that sees this token (so at least its own position plus
            one); "xla" only.

    Returns:
        `[B,T,N*H]`, float32.
    """
    if implementation == "xla":
        return _attend_by_blocks(q, k, v, segments, ends)
    mixed = cudnn_attention.causal(q, k, v) if segments is None else cudnn_attention.packed(q, k, v, segments)
    return mixed.reshape(*q.shape[:2], -1).astype(jnp.float32)


def masked_attention(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Softmax attention with an explicit mask, for decoding with a cache, whose layout needs no transpositions.

    Args:
        q: `[B,T,N,H]`, in the dtype of the matmul operands.
        k: `[B,K,H,S]`.
        v: `[B,K,S,H]`.
        visible: bool, broadcastable to `[B,T,S]`: which keys a query sees. If it sees none, it gets the mean of v.

    Returns:
        `[B,T,N*H]`, float32.
    """
    scores = dot("bkgth,bkhs->bkgts", _by_head(q, k.shape[1]), k) / math.sqrt(q.shape[3])
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    return _by_token(dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v)).reshape(*q.shape[:2], -1)


def visible_keys(segments: Array | None, first: int, stop: int, ends: Array | None = None) -> Array:
    """Which keys before `stop` are visible to queries `first ... stop - 1`, bool `[B or 1,stop-first,stop]`."""
    shape = (stop - first, stop)
    queries = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    visible = (jax.lax.broadcasted_iota(jnp.int32, shape, 1) <= queries)[None]
    if segments is not None:
        visible &= segments[:, None, :stop] == segments[:, first:stop, None]
    if ends is not None:
        visible &= queries < ends[:, None, :stop]
    return visible


@jax.custom_vjp
def _attend_by_blocks(q: Array, k: Array, v: Array, segments: Array | None, ends: Array | None) -> Array:
    """Each block of queries attends to the keys up to its own end: half of all scores, and only one block at a time.

    The backward pass reuses each query's log-sum-exp and recomputes the scores, as FlashAttention does (arXiv
    2205.14135, section 3.1), but sums p * dp directly, since a block holds whole rows, and so does not need the output.
    In every product the block of scores is the result, the left or the untransposed right operand: on a CPU,
    transposing the scores costs ten times the product.
    """
    return _attend_by_blocks_fwd(q, k, v, segments, ends)[0]


def _attend_by_blocks_fwd(
    q: Array, k: Array, v: Array, segments: Array | None, ends: Array | None
) -> tuple[Array, _Saved]:
    queries, keys, values = _by_head(q, k.shape[2]), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    mixed, sums = [], []
    for first, stop in _query_blocks(q.shape[1]):
        scores = _block_scores(queries[:, :, :, first:stop], keys, segments, ends, first)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed.append(dot("bkgts,bksh->bkgth", weights.astype(v.dtype), values[:, :, :stop]) / total)
        sums.append(highest + jnp.log(total))
    # If a remat policy saves it by name, the backward pass need not rerun this function.
    log_sums = checkpoint_name(jnp.concatenate(sums, axis=3), "attention_log_sums")
    out = _by_token(jnp.concatenate(mixed, axis=3)).reshape(*q.shape[:2], -1)
    return out, (q, k, v, segments, ends, log_sums)


def _attend_by_blocks_bwd(saved: _Saved, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, segments, ends, log_sums = saved
    length, kv_heads, scale = q.shape[1], k.shape[2], 1 / math.sqrt(q.shape[3])
    d_out = d_out.reshape(q.shape).astype(q.dtype)
    queries, cotangents = _by_head(q, kv_heads), _by_head(d_out, kv_heads)
    queries_t, cotangents_t = queries.swapaxes(3, 4), cotangents.swapaxes(3, 4)
    keys, keys_t, values_t = k.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    dq = []
    dk = dv = jnp.zeros(keys_t.shape, jnp.float32)
    for first, stop in _query_blocks(length):
        block = slice(first, stop)
        scores = _block_scores(queries[:, :, :, block], keys_t, segments, ends, first)
        weights = jnp.exp(scores - log_sums[:, :, :, block])
        d_weights = dot("bkgth,bkhs->bkgts", cotangents[:, :, :, block], values_t[..., :stop])
        row_sums = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - row_sums) * scale).astype(q.dtype)
        dv = _add_in_front(dv, dot("bkght,bkgts->bkhs", cotangents_t[..., block], weights.astype(q.dtype)))
        dk = _add_in_front(dk, dot("bkght,bkgts->bkhs", queries_t[..., block], d_scores))
        dq.append(dot("bkgts,bksh->bkgth", d_scores, keys[:, :, :stop]))
    d_queries = _by_token(jnp.concatenate(dq, axis=3)).astype(q.dtype)
    d_keys, d_values = dk.transpose(0, 3, 1, 2).astype(k.dtype), dv.transpose(0, 3, 1, 2).astype(v.dtype)
    return d_queries, d_keys, d_values, None, None


_attend_by_blocks.defvjp(_attend_by_blocks_fwd, _attend_by_blocks_bwd)


def _add_in_front(total: Array, part: Array) -> Array:
    """Adds to the first columns, in place: XLA would fuse sums of padded parts, element by element, into their use."""
    front = total[..., : part.shape[-1]] + part
    return jax.lax.dynamic_update_slice(total, front, (0,) * total.ndim)


def query_block(length: int) -> int:
    """How many queries' scores the attention without fused kernels computes at a time, for sequence length T."""
    return min(length, max(_SMALLEST_BLOCK, -(-length // _BLOCKS)))


def _query_blocks(length: int) -> list[tuple[int, int]]:
    size = query_block(length)
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _block_scores(queries: Array, keys_t: Array, segments: Array | None, ends: Array | None, first: int) -> Array:
    """Scaled scores `[B,K,G,t,stop]` of `queries [B,K,G,t,H]`, -inf where a key is hidden; `keys_t [B,K,H,T]`."""
    stop = first + queries.shape[3]
    scores = dot("bkgth,bkhs->bkgts", queries, keys_t[..., :stop]) / math.sqrt(queries.shape[-1])
    return jnp.where(visible_keys(segments, first, stop, ends)[:, None, None], scores, -jnp.inf)


def _by_head(x: Array, kv_heads: int) -> Array:
    """`[B,T,N,H]` -> `[B,K,G,T,H]`, grouping the G query heads of each key head."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _by_token(x: Array) -> Array:
    """The inverse of `_by_head`."""
    batch, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def choose_attention(spec: ModelSpec, compute_dtype: Any, *, packed: tuple[int, int] | None = None) -> Implementation:
    """cuDNN if there is a GPU and cuDNN passes a self-test on this model's heads; else XLA, warning why on a GPU.

    Every process of a run must get the same answer, so its hosts need the same GPUs and libraries.

    Args:
        spec: the model.
        compute_dtype: dtype of the matmul operands.
        packed: (B, T) of a device's forward pass if the run packs several segments into a row, else None. XLA gives
            cuDNN as much workspace as if each of a row's `cudnn_attention.MAX_RUNS` segments were T tokens long, so
            the function asks the compiler whether that exceeds what XLA's blocks of scores take.
    """
    if jax.default_backend() != "gpu":
        return "xla"
    fault = _cudnn_fault(spec, jnp.dtype(compute_dtype), packed)
    if fault is None:
        return "cudnn"
    message = f"attention: cuDNN flash attention is NOT used, the slower XLA path is: {fault}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return "xla"


def _cudnn_fault(spec: ModelSpec, dtype: Any, packed: tuple[int, int] | None) -> str | None:
    """What is wrong with cuDNN, in one line: an error, a non-finite result, one unlike XLA's, or too much workspace."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, the compute dtype is {dtype}"
    q, k, v, segments = _self_test_case(spec, dtype)
    fused = _output_and_gradients(functools.partial(attention, implementation="cudnn"))
    for name, layout in (("plain", None), ("packed", segments))[: 2 if packed else 1]:
        expected = _output_and_gradients(attention)(q, k, v, layout)
        try:
            found = jax.block_until_ready(fused(q, k, v, layout))
        except Exception as error:  # whatever jax, XLA or a changed private jax function raises, the run continues
            return f"{name} rows: {_first_line(error)}"
        for part in ("output", "dq", "dk", "dv"):
            if not bool(jnp.all(jnp.isfinite(found[part]))):
                return f"{name} rows: {part} is not finite"
            distance = float(jnp.linalg.norm(found[part] - expected[part]) / jnp.linalg.norm(expected[part]))
            if distance > _TOLERANCE:
                return f"{name} rows: {part} differs from XLA's by {distance:.1%}, expected at most {_TOLERANCE:.0%}"
    if packed:
        try:
            needed, usual = (_workspace(spec, dtype, *packed, attend) for attend in (_by_cudnn, attention))
        except Exception as error:  # as above
            return f"packed rows of {packed[1]} tokens: {_first_line(error)}"
        if needed > max(usual, _WORKSPACE):
            sizes = f"{needed / 2**30:.1f} GiB of workspace, XLA's path {usual / 2**30:.1f}"
            return f"packed rows: {packed[0]} x {packed[1]} tokens need {sizes}"
    return None


def _heads(spec: ModelSpec) -> tuple[int, int, int]:
    return spec.num_heads, spec.num_kv_heads, spec.num_kv_heads


def _self_test_case(spec: ModelSpec, dtype: Any) -> tuple[Array, Array, Array, Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, 256, n, spec.head_dim), dtype) for key, n in zip(keys, _heads(spec), strict=True)
    )
    ids = jnp.asarray([1, 2, 3, -1])
    return q, k, v, jnp.stack([jnp.repeat(ids, jnp.asarray(sizes), total_repeat_length=256) for sizes in _SIZES])


def _workspace(spec: ModelSpec, dtype: Any, rows: int, length: int, attend: Callable[..., Array]) -> int:
    """Bytes that a layer's attention over packed rows and its gradient need on a device, besides operands and results.

    Args:
        spec: the model.
        dtype: of the operands.
        rows: B, the rows of one device.
        length: T, the length of the rows.
        attend: (q, k, v, segments) -> `[B,T,N*H]` on one device: nothing is sharded here.
    """
    mesh = active_mesh()
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    heads = (n if n % tensor else n // tensor for n in _heads(spec))
    operands = (jax.ShapeDtypeStruct((rows, length, n, spec.head_dim), dtype) for n in heads)
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    compiled = _output_and_gradients(attend).lower(*operands, segments).compile()
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)


def _by_cudnn(q: Array, k: Array, v: Array, segments: Array) -> Array:
    mixed = cudnn_attention.packed_here(q, k, v, segments)
    return mixed.reshape(*q.shape[:2], -1).astype(jnp.float32)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _output_and_gradients(attend: Callable[..., Array]) -> Any:
    """(q, k, v, segments) -> float32 vectors by name, compiled; `attend` takes the same arguments."""

    def run(q: Array, k: Array, v: Array, segments: Array | None) -> dict[str, Array]:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        gradients = pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))
        named = dict(zip(("output", "dq", "dk", "dv"), (out, *gradients), strict=True))
        return {name: array.astype(jnp.float32).ravel() for name, array in named.items()}

    return jax.jit(run)
