"""Which entries go: exact counts with a defined order among ties, per row, matrix, bounded matrix or N:M.

The k-th smallest score is found by bisection on its float32 bit pattern, which orders non-negative floats as integers:
exact with ties and subnormals, the same under `jit`, `vmap` and on sharded arrays, and no sort.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efx_jax.config_rules import n_of_m
from efx_jax.errors import InputError

Array = jax.Array
_NEVER = 0xFFFFFFFF  # above the bits of every float: such an entry is never among the lowest


class Counts(NamedTuple):
    """How many entries go: `total` of the comparison group, between `row_low` and `row_high` of every row (bounded)."""

    total: int
    row_low: int = 0
    row_high: int = 0


def parse_pattern(group: str) -> tuple[int, int] | None:
    """(N, M) of a group "N:M" (keep N of M consecutive inputs), None for the named groups.

    Raises:
        InputError: neither a named group nor N:M with 0 < N < M.
    """
    if group in ("row", "matrix", "bounded"):
        return None
    pattern = n_of_m(group)
    if pattern is None:
        raise InputError(f"group: expected row, matrix, bounded or N:M with 0 < N < M such as 2:4, found {group!r}")
    return pattern


def drop_count(sparsity: float, entries: int) -> int:
    """floor(sparsity * entries + 1e-9): the small term undoes the rounding of, say, 0.3 * 10."""
    return math.floor(sparsity * entries + 1e-9)


def selection_counts(shape: tuple[int, ...], sparsity: float, group: str, bound: float | None = None) -> Counts:
    """The exact number of entries to drop from a matrix.

    Args:
        shape: (..., O, I) of the scores.
        sparsity: share to drop, in [0, 1).
        group: "row", "matrix", "bounded" or "N:M".
        bound: largest distance of a row's sparsity from `sparsity` ("bounded").

    Raises:
        InputError: sparsity out of range, an N:M that does not match it or divide I, a missing bound.
    """
    out_dim, in_dim = shape[-2:]
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity: expected a value in [0, 1), found {sparsity}; 0 keeps every weight")
    pattern = parse_pattern(group)
    if pattern is not None:
        keep, of = pattern
        if abs(sparsity - (1 - keep / of)) > 1e-6:
            raise InputError(f"group {group}: expected sparsity {1 - keep / of:g}, found {sparsity}; set it so")
        if in_dim % of:
            raise InputError(f"group {group}: expected an input width divisible by {of}, found {in_dim}")
        return Counts(of - keep)
    if group == "row":
        return Counts(drop_count(sparsity, in_dim))
    total = drop_count(sparsity, out_dim * in_dim)
    if group == "matrix":
        return Counts(total)
    if bound is None or bound < 0:
        raise InputError(f"group bounded: expected a bound of at least 0, found {bound}; set prune.bound")
    low = max(0, drop_count(sparsity - bound, in_dim))
    high = min(in_dim, math.ceil((sparsity + bound) * in_dim - 1e-9))
    return Counts(total, low, high)


def lowest(bits: Array, count: Array | int) -> Array:
    """Marks the `count` smallest of the last axis; of equal ones the lower index goes first.

    Args:
        bits: uint32 `[..., n]`.
        count: how many, a scalar or `[...]`.

    Returns:
        bool `[..., n]` with exactly `count` True.
    """
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), bits.shape[:-1])[..., None]

    def halve(step: Array, threshold: Array) -> Array:
        """Raises the threshold by one bit wherever fewer than `count` entries lie below the raised value."""
        raised = threshold | (jnp.uint32(1) << (jnp.uint32(31) - step.astype(jnp.uint32)))
        below = jnp.sum(bits < raised, axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(below < count, raised, threshold)

    def mark(threshold: Array) -> Array:
        under, equal = bits < threshold, bits == threshold
        spare = count - jnp.sum(under, axis=-1, keepdims=True, dtype=jnp.int32)
        return (under | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= spare))) & (count > 0)

    def body(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        threshold, marked = state
        return jax.lax.cond(
            step < 32,
            lambda: (halve(step, threshold), marked),
            lambda: (threshold, mark(threshold)),
        )

    # The marking happens inside the loop, on the loop's own copy of the bits: outside, XLA may compute a cheap score
    # again in the fusion that compares it, with other roundings (fused multiply-add), and the count would be off.
    start = (jnp.zeros_like(count, jnp.uint32), jnp.zeros(bits.shape, bool))
    return jax.lax.fori_loop(0, 33, body, start)[1]


def score_bits(score: Array) -> Array:
    """Bit patterns of non-negative float32 scores: unsigned integers in the same order (-0.0 counts as 0)."""
    return jax.lax.bitcast_convert_type(jnp.abs(score.astype(jnp.float32)), jnp.uint32)


def drop_by_counts(score: Array, group: str, counts: Counts) -> Array:
    """Entries to drop, given counts from `selection_counts` (plain integers or traced scalars)."""
    bits = score_bits(score)
    out_dim, in_dim = bits.shape
    pattern = parse_pattern(group)
    if pattern is not None:
        return lowest(bits.reshape(out_dim, in_dim // pattern[1], pattern[1]), counts.total).reshape(bits.shape)
    if group == "row":
        return lowest(bits, counts.total)
    if group == "matrix":
        return lowest(bits.reshape(-1), counts.total).reshape(bits.shape)
    certain = lowest(bits, counts.row_low)
    possible = lowest(bits, counts.row_high) & ~certain
    open_bits = jnp.where(possible, bits, jnp.uint32(_NEVER)).reshape(-1)
    return certain | lowest(open_bits, counts.total - out_dim * counts.row_low).reshape(bits.shape)


def select_mask(score: Array, sparsity: float, group: str = "row", bound: float | None = None) -> Array:
    """Keeps the highest scores.

    Drops exactly floor(sparsity * n + 1e-9) of the n entries of every group, of equal scores the lower index first.

    Args:
        score: non-negative `[O,I]`.
        sparsity: share to drop, in [0, 1); static.
        group: which entries compete: "row" (Wanda), "matrix", "bounded" (the matrix, but every row's sparsity within
            `bound` of `sparsity`), or "N:M" (keep N of M consecutive inputs; sparsity must be 1 - N/M); static.
        bound: see "bounded".

    Returns:
        bool `[O,I]`, True = kept.

    Raises:
        InputError: sparsity outside [0, 1), an unknown group, a pattern that does not fit.
    """
    return ~drop_by_counts(score, group, selection_counts(score.shape, sparsity, group, bound))
