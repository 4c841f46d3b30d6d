"""cuDNN's flash attention on NVIDIA GPUs, for rows of one sequence and for packed rows."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import batch_axes

Array = jax.Array

# Most segments per row, with padding as one of them. cuDNN's workspace grows with it, see `attention.choose_attention`.
MAX_RUNS = 64


def causal(q: Array, k: Array, v: Array) -> Array:
    """`[B,T,N,H]` by cuDNN's flash attention, causal without a mask tensor.

    It could be lowered for CUDA on a machine without a GPU, except that jax first asks for the installed cuDNN's
    version (and, for packed rows, the GPU's compute capability) and fails if there is none.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def packed(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """`[B,T,N,H]` by cuDNN's flash attention over ragged segments, padding as a segment of its own. Hopper or newer.

    Keys and values are repeated to N heads first: jax 0.10 computes the keys' offsets with the number of query heads,
    which is wrong if there are fewer key heads (fixed in jax 0.12). On a mesh every device passes its own rows and
    heads: under automatic partitioning it would get the offsets of all rows with only its own q, k and v.
    """
    mesh = active_mesh()
    if mesh is None:
        return packed_here(q, k, v, segments)
    k, v = _repeated(q, k, v)
    batch = batch_axes(q.shape[0], mesh.shape) or None
    heads = P(batch, None, None if q.shape[2] % mesh.shape["tensor"] else "tensor", None)
    specs = (heads, heads, heads, P(batch, None))
    return jax.shard_map(packed_here, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, segments)


def packed_here(q: Array, k: Array, v: Array, segments: Array) -> Array:
    """`packed` on the rows and heads of one device."""
    # Only a private function of jax supports this.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    k, v = _repeated(q, k, v)
    starts, lengths, fits = segment_runs(segments, min(MAX_RUNS, segments.shape[1]))
    mixed = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=1 / math.sqrt(q.shape[-1]),
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
    return jnp.where(fits[:, None, None, None], mixed, jnp.nan)


def _repeated(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values `[B,T,N,H]`, each key head repeated for each of its query heads."""
    group = q.shape[2] // k.shape[2]
    return jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)


def segment_runs(segments: Array, most: int) -> tuple[Array, Array, Array]:
    """Where the segments of packed rows start and how long they are, for cuDNN's ragged layout.

    Args:
        segments: int `[B,T]`, -1 on padding.
        most: M, the largest number of segments that a row may have (padding counts as one), static.

    Returns:
        Starts int32 `[B,M+1]` and lengths int32 `[B,M]`, -1 after the last segment; and bool `[B]`: whether cuDNN can
        handle the row, that is, at most M segments, ascending from 1, padding last.
    """
    batch = segments.shape[0]
    ranks = jnp.where(segments < 0, jnp.iinfo(jnp.int32).max, segments)
    steps = ranks[:, 1:] != ranks[:, :-1]
    begins = jnp.concatenate([jnp.ones((batch, 1), bool), steps], axis=1)
    runs = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    rows = jnp.arange(batch)[:, None]
    lengths = jnp.zeros((batch, most), jnp.int32).at[rows, runs].add(1, mode="drop")
    starts = jnp.cumsum(lengths, axis=1) - lengths
    used = lengths > 0
    starts = jnp.pad(jnp.where(used, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    ascending = jnp.all(ranks[:, 1:] >= ranks[:, :-1], axis=1) & jnp.all(segments != 0, axis=1)
    return starts, jnp.where(used, lengths, -1), ascending & (runs[:, -1] < most)
