"""Next-token loss in chunks: one chunk of logits exists at a time, and only positions that carry loss are read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efx_jax.einsum import dot
from efx_jax.parallel.partition import VOCABULARY, Axes, active_batch_axes

Array = jax.Array
_CHUNK_TOKENS = 512


def cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, compute_dtype: Any = None
) -> tuple[Array, Array]:
    """Summed negative log-likelihood and output entropy of the weighted positions, in nats.

    Positions of weight 0 are skipped, not multiplied by 0: with loss on short responses that saves most of the head.
    The head gets no gradient (LoRA training never changes it).

    Args:
        hidden: final-normed hidden states `[B,T,D]`.
        head: output embedding `[V,D]`.
        targets: int `[B,T]`, the next tokens.
        weights: float `[B,T]`.
        compute_dtype: dtype of the matmul operands; None takes the head's.

    Returns:
        (nll, entropy), float32 scalars; only nll is differentiable.
    """
    dtype = head.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    batch = active_batch_axes(hidden.shape[0])
    frozen_head = jax.lax.stop_gradient(head).astype(dtype)
    return _cross_entropy(batch, hidden, frozen_head, jnp.asarray(targets), jnp.asarray(weights, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    batch: Axes | None, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    return _cross_entropy_fwd(batch, hidden, head, targets, weights)[0]


def _cross_entropy_fwd(
    batch: Axes | None, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """On a mesh every device reads its own tokens and its part of the vocabulary."""
    local = functools.partial(_nll_and_gradient, batch)
    if batch is not None:
        rows = P(batch or None, None)
        states = P(batch or None, None, None)
        local = jax.shard_map(
            local, in_specs=(states, P(VOCABULARY, None), rows, rows), out_specs=(P(), P(), states), check_vma=False
        )
    nll, entropy, d_hidden = local(hidden, head, targets, weights)
    return (nll, entropy), (d_hidden, head)


def _cross_entropy_bwd(
    batch: Axes | None, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    d_hidden, head = residuals
    return (d_hidden * cotangents[0]).astype(d_hidden.dtype), jnp.zeros_like(head), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _nll_and_gradient(
    batch: Axes | None, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Sums of nll and entropy, and d nll / d hidden `[B,T,D]`, computed while a chunk's logits exist.

    Args:
        batch: mesh axes that split the tokens; None: one device.
        hidden: `[B,T,D]`.
        head: `[V,D]`; on a mesh this device's part of the vocabulary over `tensor` and `fsdp`.
        targets: int `[B,T]`.
        weights: float32 `[B,T]`.
    """
    parts: tuple[str, ...] = () if batch is None else ("tensor",)
    head = local_vocabulary(head, parts)
    first = jax.lax.axis_index("tensor") * head.shape[0] if parts else jnp.int32(0)
    vocabulary = jnp.arange(head.shape[0])

    def chunk(weight: Array, x: Array, target: Array) -> tuple[Array, Array]:
        logits = dot("td,vd->tv", x, head)
        powers, total, log_total = exponentials(logits, parts)
        here = (target >= 0) & (target < head.shape[0])
        chosen_logit = jnp.take_along_axis(logits, jnp.where(here, target, 0)[:, None], axis=1)[:, 0]
        nll = jnp.sum(weight * (log_total - over(jax.lax.psum, jnp.where(here, chosen_logit, 0), parts)))
        mean_logit = sum_vocabulary(powers * logits, parts) / total
        entropy = jnp.sum(weight * (log_total - mean_logit))
        probs = powers * (1 / total)[:, None]
        d_logits = (weight[:, None] * (probs - (vocabulary == target[:, None]))).astype(x.dtype)
        d_x = dot("tv,vd->td", d_logits, head)
        return jnp.stack([nll, entropy]), over(jax.lax.psum, d_x, parts)

    (nll, entropy), d_hidden = by_chunks(chunk, weights, hidden, (targets - first,), head.dtype, 2)
    return over(jax.lax.psum, nll, batch), over(jax.lax.psum, entropy, batch), d_hidden


def draw_tokens(hidden: Array, head: Array, row_keys: Array, compute_dtype: Any = None) -> Array:
    """A next token for every position, drawn from what the model predicts there; some hundred positions at a time.

    What is drawn at a position depends on its row's key and its place in the row, and on nothing beside it.

    Args:
        hidden: final-normed hidden states `[B,T,D]`.
        head: output embedding `[V,D]`.
        row_keys: PRNG key of every row `[B]`.
        compute_dtype: dtype of the matmul operands; None takes the head's.

    Returns:
        int32 `[B,T]`.
    """
    head = head.astype(head.dtype if compute_dtype is None else jnp.dtype(compute_dtype))
    rows, length, width = hidden.shape
    fold_places = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(fold_places, in_axes=(0, None))(row_keys, jnp.arange(length)).reshape(-1)

    def draw(operands: tuple[Array, Array]) -> Array:
        key, x = operands
        logits = dot("d,vd->v", x, head)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    states = hidden.reshape(-1, width).astype(head.dtype)
    return jax.lax.map(draw, (keys, states), batch_size=_CHUNK_TOKENS).reshape(rows, length)


def by_chunks(
    chunk: Callable[..., tuple[Array, Array]],
    weights: Array,
    hidden: Array,
    others: tuple[Array, ...],
    dtype: Any,
    terms: int,
) -> tuple[Array, Array]:
    """Sums over the positions that carry weight, and their gradient, some hundred positions at a time.

    Args:
        chunk: (weights `[t]`, hidden states `[t,D]`, the others `[t,...]`) -> (`terms` sums, d sum / d hidden `[t,D]`).
        weights: float32 `[B,T]`; positions of weight 0 are skipped.
        hidden: `[B,T,D]`.
        others: arrays `[B,T,...]` that a chunk reads besides.
        dtype: of the hidden states in a chunk.
        terms: number of sums.

    Returns:
        The sums `[terms]`, and the gradient `[B,T,D]` in the dtype of `hidden`.
    """
    flat = weights.reshape(-1)
    order = jnp.argsort(flat == 0, stable=True)
    order = jnp.pad(order, (0, -flat.size % _CHUNK_TOKENS))
    chosen = jnp.where(jnp.arange(order.size) < flat.size, flat[order], 0.0)
    states = hidden.reshape(flat.size, -1)[order].astype(dtype)
    ordered = [other.reshape(flat.size, *other.shape[2:])[order] for other in others]

    def add(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, d_states = carry
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * _CHUNK_TOKENS, slice_size=_CHUNK_TOKENS
        )
        weight = take(chosen)
        # The last chunk is filled up with skipped positions, whose states may be anything.
        x = jnp.where(weight[:, None] > 0, take(states), 0)
        found, d_x = chunk(weight, x, *(take(other) for other in ordered))
        d_states = jax.lax.dynamic_update_slice(d_states, d_x.astype(states.dtype), (index * _CHUNK_TOKENS, 0))
        return sums + found, d_states

    chunks = (jnp.sum(flat > 0) + _CHUNK_TOKENS - 1) // _CHUNK_TOKENS
    sums, d_states = jax.lax.fori_loop(0, chunks, add, (jnp.zeros(terms, jnp.float32), jnp.zeros_like(states)))
    places = jnp.argsort(order[: flat.size])
    return sums, d_states[places].reshape(hidden.shape).astype(hidden.dtype)


def local_vocabulary(head: Array, parts: Axes) -> Array:
    """This device's part of the output embedding `[V,D]`, whole over `fsdp`, inside `jax.shard_map` over `parts`."""
    return jax.lax.all_gather(head, "fsdp", axis=0, tiled=True) if parts else head


def exponentials(logits: Array, parts: Axes) -> tuple[Array, Array, Array]:
    """exp(logit - largest) `[t,V]`, its sum over the vocabulary and the logarithm of the sum of exp(logit), `[t]`.

    On a CPU a pass over the logits takes as long as their GEMM, and a sum with an exponential inside three times that:
    the exponentials are formed once.
    """
    largest = over(jax.lax.pmax, jnp.max(logits, axis=-1), parts)
    powers = jnp.exp(logits - largest[:, None])
    total = sum_vocabulary(powers, parts)
    return powers, total, jnp.log(total) + largest


def over(collective: Any, values: Array, axes: Axes | None) -> Array:
    """A collective over mesh axes, where there are any."""
    return collective(values, axes) if axes else values


def sum_vocabulary(values: Array, parts: Axes) -> Array:
    """The sum over the vocabulary, which the axes `parts` split."""
    return over(jax.lax.psum, jnp.sum(values, axis=-1), parts)
