"""Log-probabilities from hidden states without ever holding all logits of a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efx_jax.einsum import contract
from efx_jax.model.loss import local_vocabulary, over
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import VOCABULARY, Axes, active_batch_axes

Array = jax.Array

LOGITS_BYTES = 50 * 2**20
# The activations of this many tokens fit a CPU's caches: with SmolLM2-135M, 2,560 at once take 1.5 times as long.
_CACHED_TOKENS = 640


def score_rows(
    score: Callable[[dict[str, Array]], Array], batch: dict[str, Array], masks: Mapping[str, Array] | None
) -> Array:
    """`score(batch)`; on one CPU a few rows at a time, as many as its caches hold.

    Args:
        score: maps arrays `[B,...]` to an array `[B,...]`, each row independently.
        batch: `tokens` int `[B,T]` and other arrays `[B,...]`.
        masks: the model's masks; with masks the batch is not split, since they would be applied to the weights again
            for every few rows.
    """
    rows, length = batch["tokens"].shape
    if jax.default_backend() != "cpu" or active_mesh() is not None or masks is not None:
        return score(batch)
    few = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * length <= _CACHED_TOKENS))
    parts = {name: array.reshape(rows // few, few, *array.shape[1:]) for name, array in batch.items()}
    found = jax.lax.map(score, parts)
    return found.reshape(rows, *found.shape[2:])


def target_log_probabilities(
    hidden: Array, head: Array, sources: jax.typing.ArrayLike, targets: jax.typing.ArrayLike, compute_dtype: Any
) -> Array:
    """Log-probabilities of chosen tokens, row by row in chunks whose logits take at most 50 MiB.

    On a mesh every device handles its own rows and its part of the vocabulary.

    Args:
        hidden: final-normed hidden states `[N,S,D]`.
        head: output embedding `[V,D]`.
        sources: int `[N,Q]` or `[Q]`: which of the S positions predicts the target.
        targets: int, same shape: the predicted token.
        compute_dtype: dtype of the matmul operands, None for the head's own; sums are float32.

    Returns:
        float32 `[N,Q]`.
    """
    dtype = head.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    shape = (len(hidden), jnp.shape(targets)[-1])
    sources, targets = jnp.broadcast_to(sources, shape), jnp.broadcast_to(targets, shape)
    batch = active_batch_axes(len(hidden))
    local = functools.partial(_log_probabilities, batch)
    if batch is not None:
        rows, states = PartitionSpec(batch or None, None), PartitionSpec(batch or None, None, None)
        local = jax.shard_map(
            local,
            in_specs=(states, PartitionSpec(VOCABULARY, None), rows, rows),
            out_specs=rows,
            check_vma=False,
        )
    found: Array = local(hidden.astype(dtype), head.astype(dtype), sources, targets)
    return found


def _log_probabilities(batch: Axes | None, hidden: Array, head: Array, sources: Array, targets: Array) -> Array:
    """`target_log_probabilities` of one device's rows.

    Args:
        batch: mesh axes that split the rows; None: one device.
        hidden: `[N,S,D]`.
        head: `[V,D]`; on a mesh this device's part of the vocabulary over `tensor` and `fsdp`.
        sources: int `[N,Q]`.
        targets: int `[N,Q]`.
    """
    parts: Axes = () if batch is None else ("tensor",)
    head = local_vocabulary(head, parts)
    if parts:
        targets = targets - jax.lax.axis_index("tensor") * head.shape[0]

    def row(inputs: tuple[Array, Array, Array]) -> Array:
        states, source, target = inputs
        logits = contract("sd,vd->sv", states, head)
        here = (target >= 0) & (target < head.shape[0])
        chosen = jnp.where(here, logits[source, jnp.where(here, target, 0)], 0.0)
        return over(jax.lax.psum, chosen, parts) - _log_sum(logits, parts)[source]

    chunk = max(1, LOGITS_BYTES // (4 * hidden.shape[1] * head.shape[0]))
    return jax.lax.map(row, (hidden, sources, targets), batch_size=chunk)


def _log_sum(logits: Array, parts: Axes) -> Array:
    """log sum exp over the last axis of `[S,V]`, which is split over the mesh axes `parts`."""
    # The sum is a product with ones: inside a plain sum XLA's CPU backend computes the exponentials one by one, which
    # takes twice as long as everything else.
    largest = over(jax.lax.pmax, jnp.max(logits, axis=-1), parts)
    powers = jnp.exp(logits - largest[..., None])
    total = jnp.einsum("sv,v->s", powers, jnp.ones(logits.shape[-1]), precision="highest")
    return largest + jnp.log(over(jax.lax.psum, total, parts))
