"""Next-token loss in chunks: one chunk of logits exists at a time, and only positions of nonzero weight are read."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efx_jax.einsum import dot
from efx_jax.parallel.partition import VOCABULARY, Axes, active_batch_axes

Array = jax.Array
CHUNK_TOKENS = 512
# A token is drawn by first choosing a group of this many probabilities by its sum (or half as many, and so on down to
# the least), then a token of the group.
_DRAWN_TOGETHER, _LEAST_TOGETHER = 256, 32


def cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, compute_dtype: Any = None
) -> tuple[Array, Array]:
    """Summed negative log-likelihood and output entropy of the weighted positions, in nats.

    Positions of weight 0 are skipped, not multiplied by 0: with loss on short responses that saves most of the head's
    work. The head gets no gradient (LoRA training never changes it).

    Args:
        hidden: final-normed hidden states `[B,T,D]`.
        head: output embedding `[V,D]`.
        targets: int `[B,T]`, the next tokens.
        weights: float `[B,T]`.
        compute_dtype: dtype of the matmul operands; None takes the head's.

    Returns:
        (nll, entropy), float32 scalars; only nll is differentiable.
    """
    return _sum_loss(False, hidden, head, jnp.asarray(targets), weights, compute_dtype)


def drawn_cross_entropy(
    hidden: Array, head: Array, fractions: Array, weights: Array, compute_dtype: Any = None
) -> tuple[Array, Array]:
    """As `cross_entropy`, but for tokens drawn from the model's own distribution instead of those of a text.

    Args:
        fractions: float32 `[B,T]` in [0, 1): the token of a position is the first whose cumulative probability, in the
            order of the vocabulary, exceeds its fraction. Uniform fractions sample the model's distribution.
    """
    return _sum_loss(True, hidden, head, jnp.asarray(fractions, jnp.float32), weights, compute_dtype)


def _sum_loss(
    drawn: bool, hidden: Array, head: Array, targets: Array, weights: Array, compute_dtype: Any
) -> tuple[Array, Array]:
    dtype = head.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    batch = active_batch_axes(hidden.shape[0])
    frozen_head = jax.lax.stop_gradient(head).astype(dtype)
    return _cross_entropy(batch, drawn, hidden, frozen_head, targets, jnp.asarray(weights, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    batch: Axes | None, drawn: bool, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    return _cross_entropy_fwd(batch, drawn, hidden, head, targets, weights)[0]


def _cross_entropy_fwd(
    batch: Axes | None, drawn: bool, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """On a mesh every device handles its own tokens and its part of the vocabulary."""
    local = functools.partial(_nll_and_gradient, batch, drawn)
    if batch is not None:
        rows = P(batch or None, None)
        states = P(batch or None, None, None)
        local = jax.shard_map(
            local, in_specs=(states, P(VOCABULARY, None), rows, rows), out_specs=(P(), P(), states), check_vma=False
        )
    nll, entropy, d_hidden = local(hidden, head, targets, weights)
    return (nll, entropy), (d_hidden, head)


def _cross_entropy_bwd(
    batch: Axes | None, drawn: bool, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    d_hidden, head = residuals
    return (d_hidden * cotangents[0]).astype(d_hidden.dtype), jnp.zeros_like(head), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _nll_and_gradient(
    batch: Axes | None, drawn: bool, hidden: Array, head: Array, targets: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Sums of nll and entropy, and d nll / d hidden `[B,T,D]`, all computed while a chunk's logits exist.

    Args:
        batch: mesh axes that split the tokens; None: one device.
        drawn: whether `targets` are float32 fractions `[B,T]` by which the tokens are drawn.
        hidden: `[B,T,D]`.
        head: `[V,D]`; on a mesh this device's part of the vocabulary over `tensor` and `fsdp`.
        targets: int `[B,T]` unless `drawn`.
        weights: float32 `[B,T]`.
    """
    parts: tuple[str, ...] = () if batch is None else ("tensor",)
    head = local_vocabulary(head, parts)
    first = jax.lax.axis_index("tensor") * head.shape[0] if parts else jnp.int32(0)
    vocabulary = jnp.arange(head.shape[0])

    def chunk(weight: Array, x: Array, target: Array) -> tuple[Array, Array]:
        logits = dot("td,vd->tv", x, head)
        powers, total, log_total = exponentials(logits, parts)
        if drawn:
            target = _draw(powers, target, parts)
        here = (target >= 0) & (target < head.shape[0])
        chosen_logit = jnp.take_along_axis(logits, jnp.where(here, target, 0)[:, None], axis=1)[:, 0]
        nll = jnp.sum(weight * (log_total - over(jax.lax.psum, jnp.where(here, chosen_logit, 0), parts)))
        mean_logit = sum_vocabulary(powers * logits, parts) / total
        entropy = jnp.sum(weight * (log_total - mean_logit))
        probs = powers * (1 / total)[:, None]
        d_logits = (weight[:, None] * (probs - (vocabulary == target[:, None]))).astype(x.dtype)
        d_x = dot("tv,vd->td", d_logits, head)
        return jnp.stack([nll, entropy]), over(jax.lax.psum, d_x, parts)

    others = (targets if drawn else targets - first,)
    (nll, entropy), d_hidden = by_chunks(chunk, weights, hidden, others, head.dtype, 2)
    return over(jax.lax.psum, nll, batch), over(jax.lax.psum, entropy, batch), d_hidden


def _draw(powers: Array, fractions: Array, parts: Axes) -> Array:
    """The token at a fraction of the cumulative probability, as an index into this device's part of the vocabulary.

    It searches the sums of groups of probabilities, then one group: a cumulative sum over the whole vocabulary, or a
    random number for each of its tokens, would take longer than the logits.

    Args:
        powers: float32 `[t,V]`, proportional to the probabilities.
        fractions: float32 `[t]` in [0, 1).
        parts: mesh axes that split the vocabulary.

    Returns:
        int32 `[t]`; -1 where the token belongs to another device.
    """
    vocabulary = powers.shape[1]
    # If the vocabulary is not a multiple of the width, slicing off its main part makes a copy.
    common = math.gcd(vocabulary, _DRAWN_TOGETHER)
    width = common if common >= _LEAST_TOGETHER else _DRAWN_TOGETHER
    whole = vocabulary - vocabulary % width
    sums = jnp.sum(powers[:, :whole].reshape(len(powers), -1, width), axis=-1)
    if whole < vocabulary:
        sums = jnp.concatenate([sums, jnp.sum(powers[:, whole:], axis=-1, keepdims=True)], axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    goals, mine = fractions * ends[:, -1], jnp.bool_(True)
    if parts:
        device, bounds = jax.lax.axis_index(parts), jnp.cumsum(jax.lax.all_gather(ends[:, -1], parts), axis=0)
        goals = fractions * bounds[-1]
        mine = device == _first_above(bounds.T, goals)
        goals = goals - (bounds[device] - ends[:, -1])
    group = _first_above(ends, goals)[:, None]
    places = group * width + jnp.arange(width)
    inside = jnp.take_along_axis(powers, jnp.minimum(places, vocabulary - 1), axis=1)
    inside = jnp.where(places < vocabulary, inside, 0)
    passed = jnp.take_along_axis(ends - sums, group, axis=1)[:, 0]
    place = group[:, 0] * width + _first_above(jnp.cumsum(inside, axis=-1), goals - passed)
    return jnp.where(mine, jnp.minimum(place, vocabulary - 1), -1)


def _first_above(ends: Array, goals: Array) -> Array:
    """The first index in each row of rising `ends [t,n]` above its goal `[t]`; the last if rounding leaves none."""
    return jnp.minimum(jnp.sum(ends <= goals[:, None], axis=-1, dtype=jnp.int32), ends.shape[-1] - 1)


def by_chunks(
    chunk: Callable[..., tuple[Array, Array]],
    weights: Array,
    hidden: Array,
    others: tuple[Array, ...],
    dtype: Any,
    terms: int,
) -> tuple[Array, Array]:
    """Runs `chunk` over the positions of nonzero weight, 512 at a time; returns the sums and their gradient.

    Args:
        chunk: (weights `[t]`, hidden states `[t,D]`, the others `[t,...]`) -> (`terms` sums, d sum / d hidden `[t,D]`).
        weights: float32 `[B,T]`; positions of weight 0 are skipped.
        hidden: `[B,T,D]`.
        others: further arrays `[B,T,...]` that a chunk reads.
        dtype: dtype of the hidden states in a chunk.
        terms: number of sums.

    Returns:
        The sums `[terms]`, and the gradient `[B,T,D]` in the dtype of `hidden`.
    """
    flat = weights.reshape(-1)
    order = jnp.argsort(flat == 0, stable=True)
    order = jnp.pad(order, (0, -flat.size % CHUNK_TOKENS))
    chosen = jnp.where(jnp.arange(order.size) < flat.size, flat[order], 0.0)
    states = hidden.reshape(flat.size, -1)[order].astype(dtype)
    ordered = [other.reshape(flat.size, *other.shape[2:])[order] for other in others]

    def add(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        sums, d_states = carry
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * CHUNK_TOKENS, slice_size=CHUNK_TOKENS
        )
        weight = take(chosen)
        # The last chunk is filled up with skipped positions, whose states may hold anything.
        x = jnp.where(weight[:, None] > 0, take(states), 0)
        found, d_x = chunk(weight, x, *(take(other) for other in ordered))
        d_states = jax.lax.dynamic_update_slice(d_states, d_x.astype(states.dtype), (index * CHUNK_TOKENS, 0))
        return sums + found, d_states

    chunks = (jnp.sum(flat > 0) + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    sums, d_states = jax.lax.fori_loop(0, chunks, add, (jnp.zeros(terms, jnp.float32), jnp.zeros_like(states)))
    places = jnp.argsort(order[: flat.size])
    return sums, d_states[places].reshape(hidden.shape).astype(hidden.dtype)


def local_vocabulary(head: Array, parts: Axes) -> Array:
    """This device's part of the output embedding `[V,D]`, gathered over `fsdp`, in a `jax.shard_map` over `parts`."""
    return jax.lax.all_gather(head, "fsdp", axis=0, tiled=True) if parts else head


def exponentials(logits: Array, parts: Axes) -> tuple[Array, Array, Array]:
    """exp(logit - largest) `[t,V]`, its sum over the vocabulary and the logarithm of the sum of exp(logit), `[t]`.

    On a CPU a pass over the logits takes as long as their GEMM, and a sum with an exponential inside three times that,
    so the exponentials are computed once.
    """
    largest = over(jax.lax.pmax, jnp.max(logits, axis=-1), parts)
    powers = jnp.exp(logits - largest[:, None])
    total = sum_vocabulary(powers, parts)
    return powers, total, jnp.log(total) + largest


def over(collective: Any, values: Array, axes: Axes | None) -> Array:
    """A collective over mesh axes, if there are any."""
    return collective(values, axes) if axes else values


def sum_vocabulary(values: Array, parts: Axes) -> Array:
    """The sum over the vocabulary, which is split over the axes `parts`."""
    return over(jax.lax.psum, jnp.sum(values, axis=-1), parts)
