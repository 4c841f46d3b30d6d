"""The next token from logits: the most likely one, or one drawn from the most likely ones."""

import dataclasses

import jax
import jax.numpy as jnp

from efx_jax.errors import InputError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: first the temperature, then `top_k`, then `top_p`, as in transformers' `generate`.

    Attributes:
        temperature: divides the logits, above 0.
        top_k: only this many of the most likely tokens may be drawn; 0: all.
        top_p: only the smallest set of most likely tokens whose probabilities, among those left by `top_k`, reach this
            sum may be drawn (nucleus sampling, arXiv 1904.09751); 1: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                "sampling: expected a temperature above 0, a top_k of at least 0 and a top_p above 0 and at most 1, "
                f"found {self.temperature:g}, {self.top_k} and {self.top_p:g}"
            )


def most_likely(logits: Array) -> Array:
    """int32 `[B]` from logits `[B,V]`; ties go to the lowest token id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(keys: Array, step: Array, logits: Array, sampling: Sampling) -> Array:
    """A token for every row, from the row's own random stream, so that it does not depend on other rows.

    Args:
        keys: PRNG key of every row `[B]`.
        step: int, index of the draw.
        logits: float32 `[B,V]`.
        sampling: how to draw, static.

    Returns:
        int32 `[B]`.
    """
    candidates, tokens = candidate_logits(logits, sampling)

    def choose(key: Array, candidates: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(key, step), candidates)

    chosen = jax.vmap(choose)(keys, candidates)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=1)[:, 0]


def candidate_logits(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """The candidate tokens: logits over temperature `[B,C]`, -inf for those excluded, and int32 ids `[B,C]`.

    C is `top_k` if given, else V. Among equal logits the lowest token id is kept first.
    """
    vocabulary = logits.shape[-1]
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return logits, jnp.broadcast_to(jnp.arange(vocabulary, dtype=jnp.int32), logits.shape)
    highest, tokens = jax.lax.top_k(logits, min(sampling.top_k or vocabulary, vocabulary))
    probabilities = jax.nn.softmax(highest, axis=-1)
    # The token that reaches the sum is kept: the tokens before it fall short of the sum.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = before < sampling.top_p if sampling.top_p < 1.0 else jnp.ones_like(before, bool)
    return jnp.where(kept, highest, -jnp.inf), tokens.astype(jnp.int32)
