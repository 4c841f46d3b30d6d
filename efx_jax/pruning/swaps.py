"""Exact swaps within a row: a pruned entry comes back and a kept one goes wherever this lowers the output error.

Local search of SparseSwaps (arXiv 2512.10922) on the Gram, with the kept weights unchanged; refitting them comes
afterwards.
"""

import jax
import jax.numpy as jnp

from efx_jax.einsum import einsum
from efx_jax.shapes import require_refit

Array = jax.Array
# Relative to the sum of what the two entries add to the error. A smaller gain may be rounding: the search would swap
# the same two entries back and forth.
_LEAST_GAIN = 1e-6


def swap_mask(
    weight: Array,
    mask: Array,
    gram: Array,
    swaps: int,
    pattern: tuple[int, int] | None = None,
) -> Array:
    """The mask after up to `swaps` swaps in every row, each of which lowers ||r X^T||, r = U - mask * U.

    With p coming back and q going, r' = r - u_p e_p + u_q e_q, so that the squared error changes by exactly

        (u_p^2 G_pp - 2 u_p (r G)_p) + (u_q^2 G_qq + 2 u_q (r G)_q) - 2 u_p u_q G_pq.

    All pairs would cost O(I^2) per swap. In O(I), two are compared instead: the best p for the q that is cheapest to
    lose by itself, with the best q for that p; and the best q for the p that helps most by itself, with the best p for
    that q. Under a pattern both lie in one group of M, and all pairs within groups are compared.

    Args:
        weight: U `[O,I]`.
        mask: bool `[O,I]`, True = kept.
        gram: G = X^T X `[I,I]`.
        swaps: maximum number of swaps per row.
        pattern: (N, M) if every M consecutive inputs keep N; static.

    Returns:
        bool `[O,I]`; a row (a group of M) keeps as many as before.

    Raises:
        InputError: an array of another shape, or a mask that is not bool.
    """
    require_refit(weight, mask, gram)
    weight, gram = weight.astype(jnp.float32), gram.astype(jnp.float32)
    alone = weight**2 * jnp.diagonal(gram)
    rows = jnp.arange(weight.shape[0])

    def swap(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mask, lost_gram = state
        comes = jnp.where(mask, jnp.inf, alone - 2 * weight * lost_gram)
        goes = jnp.where(mask, alone + 2 * weight * lost_gram, jnp.inf)
        if pattern is None:
            p, q, change = _best_of_row(weight, gram, comes, goes)
        else:
            p, q, change = _best_of_groups(weight, gram, comes, goes, pattern[1])
        gains = change < -_LEAST_GAIN * (alone[rows, p] + alone[rows, q])
        mask = mask.at[rows, p].set(mask[rows, p] | gains).at[rows, q].set(mask[rows, q] & ~gains)
        moved = weight[rows, q][:, None] * gram[q] - weight[rows, p][:, None] * gram[p]
        return mask, lost_gram + jnp.where(gains[:, None], moved, 0.0)

    return jax.lax.fori_loop(0, swaps, swap, (mask, einsum("oi,ij->oj", jnp.where(mask, 0.0, weight), gram)))[0]


def _best_of_row(weight: Array, gram: Array, comes: Array, goes: Array) -> tuple[Array, Array, Array]:
    """p, q and the change of the error `[O]` of a swap, from the changes `[O,I]` of either move alone."""
    rows = jnp.arange(weight.shape[0])

    def best(one: Array, others: Array) -> tuple[Array, Array]:
        """The best partner for entry `one [O]`, and the change of the error that this partner adds."""
        change = others - 2 * weight[rows, one][:, None] * weight * gram[one]
        return jnp.argmin(change, axis=1), jnp.min(change, axis=1)

    p = best(jnp.argmin(goes, axis=1), comes)[0]
    q, beside_p = best(p, goes)
    other_q = best(jnp.argmin(comes, axis=1), goes)[0]
    other_p, beside_q = best(other_q, comes)
    change, other = comes[rows, p] + beside_p, goes[rows, other_q] + beside_q
    first = change <= other
    return jnp.where(first, p, other_p), jnp.where(first, q, other_q), jnp.where(first, change, other)


def _best_of_groups(weight: Array, gram: Array, comes: Array, goes: Array, size: int) -> tuple[Array, Array, Array]:
    """As `_best_of_row`, over all pairs within groups of `size` inputs."""
    out_dim, in_dim = weight.shape
    members = jnp.arange(in_dim).reshape(-1, size)
    grouped, coming, going = (values.reshape(out_dim, -1, size) for values in (weight, comes, goes))
    shared = 2 * grouped[..., :, None] * grouped[..., None, :] * gram[members[:, :, None], members[:, None, :]]
    change = (coming[..., :, None] + going[..., None, :] - shared).reshape(out_dim, -1)
    best = jnp.argmin(change, axis=1)
    group, pair = best // size**2, best % size**2
    return group * size + pair // size, group * size + pair % size, jnp.min(change, axis=1)
