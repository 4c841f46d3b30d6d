"""What a dense teacher teaches: its next-token distributions, at the tokens that have no label."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efx_jax.data.batches import ATTENTION_MULTIPLE, up_to_multiple
from efx_jax.einsum import dot
from efx_jax.model.loss import by_chunks, exponentials, local_vocabulary, over, sum_vocabulary
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import VOCABULARY, Axes, active_batch_axes, axes_size, batch_axes, constrain
from efx_jax.pruning.statistics import real_tokens
from efx_jax.rounding import round_up

Array = jax.Array


def rows_read(share: float, rows: int, shards: int = 1) -> int:
    """How many of `rows` rows the teacher reads: their share, rounded up, and again to a multiple of `shards`."""
    return up_to_multiple(round_up(share * rows), shards)


def positions_read(share: float, length: int) -> int:
    """How many of a row's positions the teacher reads: their share, rounded up, to whole blocks if `length` is."""
    multiple = ATTENTION_MULTIPLE if length % ATTENTION_MULTIPLE == 0 else 1
    return up_to_multiple(round_up(share * length), multiple)


def taught_rows(batch: Mapping[str, Array], key: Array, share: float, micro_batches: int) -> Array:
    """Which rows the teacher teaches: rows without labels, which nothing else trains, come first; otherwise random.

    Args:
        batch: `lengths` `[B]` and `weights` `[B,T]` of the labels.
        key: PRNG key of the draw.
        share: of the rows of every micro-batch, rounded up.
        micro_batches: number of micro-batches, to which the rows are dealt in turn.

    Returns:
        bool `[B]`.
    """
    order = jax.random.uniform(key, batch["lengths"].shape) + jnp.all(batch["weights"] == 0, axis=1)
    parts = jnp.where(batch["lengths"] > 0, order, -1.0).reshape(-1, micro_batches).T
    return (_ranks(parts) < rows_read(share, parts.shape[1])).T.reshape(-1)


def take_rows(order: Array, share: float, arrays: Any) -> Any:
    """The first rows of an order, equally many per device of a mesh; they may come from other devices.

    Args:
        order: float `[B]` of the rows of a micro-batch, highest first.
        share: of the rows, in (0, 1]; K are taken, see `rows_read`.
        arrays: any tree of arrays `[B,...]`.

    Returns:
        A tree of the same structure, of arrays `[K,...]`.
    """
    rows, mesh = order.shape[0], active_mesh()
    batch = () if mesh is None else batch_axes(rows, mesh.shape)
    shards = 1 if mesh is None else axes_size(batch, mesh.shape)
    chosen = _ranks(order) == jnp.arange(rows_read(share, rows, shards))[:, None]

    # Each row as a sum of itself and zeros: XLA's gather over a sharded axis gave wrong rows under jax 0.10.
    def take(array: Array) -> Array:
        found = jnp.where(chosen.reshape(*chosen.shape, *(1,) * (array.ndim - 1)), array, 0)
        return constrain(jnp.sum(found, axis=1, dtype=array.dtype), batch or None)

    def take_in_parts(array: Array) -> Array:
        parts = exchanges(array.shape[1], shards) if array.ndim > 2 else 1
        if parts == 1:
            return take(array)
        split = jnp.moveaxis(array.reshape(rows, parts, -1, *array.shape[2:]), 1, 0)
        return jnp.moveaxis(jax.lax.map(take, split), 0, 1).reshape(-1, *array.shape[1:])

    return jax.tree.map(take_in_parts, arrays)


def exchanges(positions: int, shards: int) -> int:
    """In how many parts `take_rows` exchanges states: each device then holds all rows' states of one part at a time."""
    return math.gcd(positions, shards)


def _ranks(order: Array) -> Array:
    """Ranks int `[...,B]` of the entries of `order` `[...,B]`, highest first, ties by lower index; without a sort."""
    index = jnp.arange(order.shape[-1])
    mine, other = order[..., :, None], order[..., None, :]
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def taught_weights(
    batch: Mapping[str, Array], key: Array, weight: float, share: float, rows: Array, prefix_share: float = 1.0
) -> Array:
    """Weights of the positions that the teacher teaches: real tokens without a label, a share of them drawn by the key.

    Every row gives the same share, rounded up to whole tokens: half of a full row fills chunks of the divergence, where
    a few more tokens would need another chunk. Divided by the number of labels, as the labels' loss is, the sum of the
    weighted divergences is `weight` times their mean.

    Args:
        batch: `tokens` `[B,T]`, `lengths` `[B]`, and `weights` `[B,T]` of the labels.
        key: PRNG key of the draw.
        weight: of the teacher relative to the labels.
        share: of the positions, in (0, 1].
        rows: bool `[B]`, see `taught_rows`.
        prefix_share: of the positions of a row, from the first on, that the teacher reads; see `positions_read`.

    Returns:
        float32 `[B,T]`.
    """
    length = batch["tokens"].shape[1]
    read = rows[:, None] * (jnp.arange(length) < positions_read(prefix_share, length))
    free = real_tokens(batch["tokens"], batch["lengths"]) * (batch["weights"] == 0) * read
    if share < 1:
        # The tolerance covers float32 rounding in products such as 0.07 * 100.
        counts = jnp.ceil(share * (1 - 1e-6) * jnp.sum(free, axis=1, keepdims=True))
        drawn = jnp.where(free > 0, jax.random.uniform(key, free.shape), 1.0)
        free = free * (jnp.argsort(jnp.argsort(drawn, axis=1), axis=1) < counts)
    labels = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    return free * (weight * labels / jnp.maximum(jnp.sum(free), 1.0))


def divergence(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    weights: Array,
    compute_dtype: Any = None,
) -> Array:
    """Summed Kullback-Leibler divergence of the model's next-token distributions from the teacher's, in nats.

    sum_t weight_t sum_v p_tv (log p_tv - log q_tv), p the teacher's (Hinton et al., arXiv 1503.02531, temperature 1).
    Its gradient with respect to a logit of the model is q - p. Neither head gets a gradient.

    Args:
        hidden: final-normed hidden states `[B,T,D]`, the only differentiable argument.
        head: output embedding `[V,D]`.
        teacher_hidden: `[B,T,E]`.
        teacher_head: `[V,E]`.
        weights: float `[B,T]`; positions of weight 0 are skipped.
        compute_dtype: dtype of the matmul operands; None: that of each head.
    """
    dtypes = [each.dtype if compute_dtype is None else jnp.dtype(compute_dtype) for each in (head, teacher_head)]
    return _divergence(
        active_batch_axes(hidden.shape[0]),
        hidden,
        jax.lax.stop_gradient(head).astype(dtypes[0]),
        jax.lax.stop_gradient(teacher_hidden).astype(dtypes[1]),
        jax.lax.stop_gradient(teacher_head).astype(dtypes[1]),
        jnp.asarray(weights, jnp.float32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(
    batch: Axes | None, hidden: Array, head: Array, teacher_hidden: Array, teacher_head: Array, weights: Array
) -> Array:
    return _divergence_fwd(batch, hidden, head, teacher_hidden, teacher_head, weights)[0]


def _divergence_fwd(batch: Axes | None, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    """On a mesh every device reads its own tokens and its part of the vocabulary."""
    local = functools.partial(_divergence_and_gradient, batch)
    if batch is not None:
        states, heads = P(batch or None, None, None), P(VOCABULARY, None)
        local = jax.shard_map(
            local,
            in_specs=(states, heads, states, heads, P(batch or None, None)),
            out_specs=(P(), states),
            check_vma=False,
        )
    found, d_hidden = local(*operands)
    return found, (d_hidden, *operands[1:])


def _divergence_bwd(
    batch: Axes | None, residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, Array, None]:
    d_hidden, head, teacher_hidden, teacher_head, _ = residuals
    zeros = jnp.zeros_like(head), jnp.zeros_like(teacher_hidden), jnp.zeros_like(teacher_head)
    return (d_hidden * cotangent).astype(d_hidden.dtype), *zeros, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def _divergence_and_gradient(
    batch: Axes | None, hidden: Array, head: Array, teacher_hidden: Array, teacher_head: Array, weights: Array
) -> tuple[Array, Array]:
    """The sum and its gradient with respect to the hidden states `[B,T,D]`; on a mesh the heads are local shards."""
    parts: tuple[str, ...] = () if batch is None else ("tensor",)
    head, teacher_head = local_vocabulary(head, parts), local_vocabulary(teacher_head, parts)

    def chunk(weight: Array, x: Array, teacher_x: Array) -> tuple[Array, Array]:
        logits = dot("td,vd->tv", x, head)
        # The last chunk's padding may hold anything: `by_chunks` zeroes it only in the model's own states.
        teacher_x = jnp.where(weight[:, None] > 0, teacher_x, 0)
        goal = dot("te,ve->tv", teacher_x, teacher_head)
        powers, total, log_total = exponentials(logits, parts)
        goal_powers, goal_total, goal_log_total = exponentials(goal, parts)
        goal_probs = goal_powers * (1 / goal_total)[:, None]
        apart = sum_vocabulary(goal_probs * (goal - logits), parts) + log_total - goal_log_total
        d_logits = weight[:, None] * (powers * (1 / total)[:, None] - goal_probs)
        d_x = dot("tv,vd->td", d_logits.astype(x.dtype), head)
        return jnp.sum(weight * apart)[None], over(jax.lax.psum, d_x, parts)

    (found,), d_hidden = by_chunks(chunk, weights, hidden, (teacher_hidden,), head.dtype, 1)
    return over(jax.lax.psum, found, batch), d_hidden
