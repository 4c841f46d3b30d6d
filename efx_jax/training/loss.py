"""Next-token loss in chunks: one chunk of logits exists at a time, and only positions that carry loss are read."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

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
    flat = jnp.asarray(weights, jnp.float32).reshape(-1)
    order = jnp.argsort(flat == 0, stable=True)
    padding = -flat.size % _CHUNK_TOKENS
    order = jnp.pad(order, (0, padding))
    chosen = jnp.where(jnp.arange(order.size) < flat.size, flat[order], 0.0)
    states = hidden.reshape(flat.size, -1)[order].astype(dtype)
    frozen_head = jax.lax.stop_gradient(head).astype(dtype)
    return _chunked_cross_entropy(states, frozen_head, jnp.asarray(targets).reshape(-1)[order], chosen)


@jax.custom_vjp
def _chunked_cross_entropy(states: Array, head: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    return _chunked_cross_entropy_fwd(states, head, targets, weights)[0]


def _chunked_cross_entropy_fwd(
    states: Array, head: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Computes the gradient of the states on the way, while the chunk's logits exist; `[n,D]`, weighted first."""
    chunks = (jnp.sum(weights > 0) + _CHUNK_TOKENS - 1) // _CHUNK_TOKENS

    def chunk(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        nll, entropy, d_states = carry
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index * _CHUNK_TOKENS, slice_size=_CHUNK_TOKENS
        )
        weight = take(weights)
        # The last chunk is filled up with skipped positions, whose states and targets may be anything.
        x = jnp.where(weight[:, None] > 0, take(states), 0)
        target = jnp.where(weight > 0, take(targets), 0)
        logits = jnp.einsum("td,vd->tv", x, head, preferred_element_type=jnp.float32)
        log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        probs = jnp.exp(log_probs)
        nll = nll - jnp.sum(weight * jnp.take_along_axis(log_probs, target[:, None], axis=1)[:, 0])
        entropy = entropy - jnp.sum(weight * jnp.sum(probs * log_probs, axis=-1))
        d_logits = weight[:, None] * (probs - (jnp.arange(head.shape[0]) == target[:, None]))
        d_x = jnp.einsum("tv,vd->td", d_logits.astype(x.dtype), head, preferred_element_type=jnp.float32)
        d_states = jax.lax.dynamic_update_slice_in_dim(d_states, d_x.astype(states.dtype), index * _CHUNK_TOKENS, 0)
        return nll, entropy, d_states

    zero = jnp.zeros((), jnp.float32)
    nll, entropy, d_states = jax.lax.fori_loop(0, chunks, chunk, (zero, zero, jnp.zeros_like(states)))
    return (nll, entropy), (d_states, head)


def _chunked_cross_entropy_bwd(
    residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    d_states, head = residuals
    return (d_states * cotangents[0]).astype(d_states.dtype), jnp.zeros_like(head), None, None


_chunked_cross_entropy.defvjp(_chunked_cross_entropy_fwd, _chunked_cross_entropy_bwd)
