"""Which entries to drop: exact counts with a defined order among ties, per row, matrix, slab, bounded matrix or N:M.

The k-th smallest score is found by bisection on float32 bit patterns, which order floats as integers (`score_bits`):
exact with ties and subnormals, the same under `jit`, `vmap` and on sharded arrays, and without a sort.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from efx_jax.config_event import ACROSS_ROWS, n_of_m
from efx_jax.errors import InputError
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import LinearAxes

Array = jax.Array
SLAB = 128  # input columns that are decided together, by SparseGPT and D-Pruner
_NEVER = 0xFFFFFFFF  # above the bits of every float: such an entry is never among the lowest
_SLIP = Fraction(1, 10**9)  # by which a computed sparsity may miss a whole number of entries
_FEW = 16  # largest group whose entries are all compared with one another


class Counts(NamedTuple):
    """How many entries to drop: `total` per comparison group, `row_low` to `row_high` in every row (bounded).

    Where the groups are slabs of columns, `rest` is the number for a narrower last slab.
    """

    total: int
    row_low: int = 0
    row_high: int = 0
    rest: int = 0


def parse_pattern(group: str) -> tuple[int, int] | None:
    """(N, M) of a group "N:M" (keep N of M consecutive inputs), None for the named groups.

    Raises:
        InputError: neither a named group nor N:M with 0 < N < M.
    """
    if group in ("row", *ACROSS_ROWS):
        return None
    pattern = n_of_m(group)
    if pattern is None:
        raise InputError(
            f"group: expected row, matrix, slab, bounded or N:M with 0 < N < M such as 2:4, found {group!r}"
        )
    return pattern


def drop_count(sparsity: float, entries: int) -> int:
    """floor(sparsity * entries + 1e-9), at most all but one; the small term allows for rounding in computed sparsities.

    In exact arithmetic: 0.7 of a 5,120 x 17,408 matrix is 62,390,272 entries, but float64 would give one fewer.
    """
    return min(math.floor(_decimal(sparsity) * entries + _SLIP), max(0, entries - 1))


def _decimal(value: float) -> Fraction:
    """The decimal number that a float prints as: 7/10 for 0.7, also for a float32."""
    narrow = isinstance(value, np.generic | jax.Array)
    return Fraction(str(np.asarray(value)[()]) if narrow else repr(float(value)))


def drop_share(counts: np.ndarray, entries: int | np.ndarray) -> np.ndarray:
    """Sparsities, float64, from which `drop_count` gives exactly these counts; the plain quotient may round down."""
    # Never below the exact quotient, so that the product with `entries` does not round below `counts`.
    return np.nextafter(counts / entries, 1.0)


def selection_counts(shape: tuple[int, ...], sparsity: float, group: str, bound: float | None = None) -> Counts:
    """The exact number of entries to drop from a matrix.

    Args:
        shape: (..., O, I) of the scores.
        sparsity: share to drop, in [0, 1).
        group: "row", "matrix", "slab", "bounded" or "N:M".
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
        if sparsity != 0 and abs(sparsity - (1 - keep / of)) > 1e-6:
            raise InputError(f"group {group}: expected sparsity {1 - keep / of:g} or 0, found {sparsity}; set it so")
        if in_dim % of:
            raise InputError(f"group {group}: expected an input width divisible by {of}, found {in_dim}")
        return Counts(of - keep if sparsity else 0)
    if group == "row":
        return Counts(drop_count(sparsity, in_dim))
    total = drop_count(sparsity, out_dim * in_dim)
    if group == "matrix":
        return Counts(total)
    if group == "slab":
        width = min(SLAB, in_dim)
        return Counts(drop_count(sparsity, out_dim * width), rest=drop_count(sparsity, out_dim * (in_dim % width)))
    if bound is None or bound < 0:
        raise InputError(f"group bounded: expected a bound of at least 0, found {bound}; set prune.bound")
    low = math.floor((_decimal(sparsity) - _decimal(bound)) * in_dim + _SLIP)
    high = math.ceil((_decimal(sparsity) + _decimal(bound)) * in_dim - _SLIP)
    return Counts(total, max(0, low), min(in_dim, high))


class Split(NamedTuple):
    """Mesh axes that split the rows and the columns of a matrix, inside `jax.shard_map`; none on one device."""

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


WHOLE = Split()


def lowest(bits: Array, count: Array | int, dims: int = 1, split: Split = WHOLE) -> Array:
    """Marks the `count` smallest along the last axis, or over the last two together; ties go to the lower index.

    Args:
        bits: uint32 `[..., n]` or, with `dims` 2, `[..., O, I]` in row-major order.
        count: how many to mark in each group.
        dims: 1 or 2, number of axes that form a group.
        split: mesh axes that these axes are split over, where `bits` is one device's part.

    Returns:
        bool like `bits`, with exactly `count` True in every group (over all devices).
    """
    if dims == 1 and not split.columns and bits.shape[-1] <= _FEW:
        return _lowest_of_few(bits, count)
    find = functools.partial(_lowest, dims=dims, split=split)
    # A pass over the scores is bound by memory on a GPU and by arithmetic on a CPU.
    return jax.lax.platform_dependent(
        bits,
        jnp.asarray(count, jnp.int32),
        cpu=functools.partial(find, digit=1),
        default=functools.partial(find, digit=4),
    )


def _lowest_of_few(bits: Array, count: Array | int) -> Array:
    """As `lowest`, for groups as small as those of N:M: every entry counts those that rank before it."""
    # One copy for all comparisons: see `_lowest`.
    bits = jax.lax.optimization_barrier(bits)
    places = jnp.arange(bits.shape[-1])
    before = jnp.zeros(bits.shape, jnp.int32)
    for place in range(bits.shape[-1]):
        other = bits[..., place : place + 1]
        before += (other < bits) | ((other == bits) & (place < places))
    return before < count


def _lowest(bits: Array, count: Array, dims: int, split: Split, digit: int) -> Array:
    """Finds the count-th smallest from its highest bits down, `digit` bits a round, and marks what lies below it."""
    group = tuple(range(-dims, 0))
    mesh_axes = split.columns if dims == 1 else split.rows + split.columns
    rounds = 32 // digit

    def total(flags: Array) -> Array:
        return _sum_over(jnp.sum(flags, axis=group, keepdims=True, dtype=jnp.int32), mesh_axes)

    def narrow(step: Array, threshold: Array) -> Array:
        """The largest next digit of the threshold with fewer than `count` entries below it."""
        shift = jnp.uint32(32) - jnp.uint32(digit) * (step.astype(jnp.uint32) + 1)
        raised = [threshold | (jnp.uint32(value) << shift) for value in range(1, 2**digit)]
        below = jnp.concatenate([jnp.sum(bits < r, axis=group, keepdims=True, dtype=jnp.int32) for r in raised], -1)
        reached = jnp.sum(_sum_over(below, mesh_axes) < count, axis=-1, keepdims=True, dtype=jnp.uint32)
        return threshold | (reached << shift)

    def mark(threshold: Array) -> Array:
        under, equal = bits < threshold, bits == threshold
        spare = count - total(under)
        return (under | (equal & (_rank(equal, dims, split) <= spare))) & (count > 0)

    def body(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        threshold, marked = state
        return jax.lax.cond(
            step < rounds,
            lambda: (narrow(step, threshold), marked),
            lambda: (threshold, mark(threshold)),
        )

    # The marking happens inside the loop, on the loop's own copy of the bits: outside, XLA may recompute a cheap score
    # in the fusion that compares it, with different rounding (fused multiply-add), and the count would be off.
    start = (jnp.zeros((*bits.shape[:-dims], *(1,) * dims), jnp.uint32), jnp.zeros(bits.shape, bool))
    return jax.lax.fori_loop(0, rounds + 1, body, start)[1]


def _rank(flags: Array, dims: int, split: Split) -> Array:
    """1, 2, ... for the set flags of every group, in order; int32 like `flags`."""
    in_row = jnp.cumsum(flags, axis=-1, dtype=jnp.int32)
    row_total = in_row[..., -1:]
    rank = in_row + _before(row_total, split.columns)
    if dims == 1:
        return rank
    row_total = _sum_over(row_total, split.columns)
    up_to_row = jnp.cumsum(row_total, axis=-2)
    return rank + up_to_row - row_total + _before(up_to_row[..., -1:, :], split.rows)


def _sum_over(values: Array, mesh_axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(values, mesh_axes) if mesh_axes else values


def _before(counts: Array, mesh_axes: tuple[str, ...]) -> Array:
    """The sum of the counts of the devices before this one along the mesh axes."""
    if not mesh_axes:
        return jnp.zeros_like(counts)
    everyone = jax.lax.all_gather(counts, mesh_axes)
    earlier = jnp.arange(everyone.shape[0]) < jax.lax.axis_index(mesh_axes)
    return jnp.tensordot(earlier.astype(jnp.int32), everyone, 1)


def score_bits(score: Array) -> Array:
    """Bit patterns of float32 scores as unsigned integers in the same order; -0.0 counts as 0, NaN above all others."""
    # On integers only: float comparisons treat subnormals as 0.
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)
    sign, infinity = jnp.uint32(1 << 31), jnp.uint32(0x7F800000)
    is_positive = (bits <= sign) | (bits & ~sign > infinity)
    return jnp.where(is_positive, bits | sign, ~bits)


def drop_by_counts(score: Array, group: str, counts: Counts, axes: LinearAxes | None = None) -> Array:
    """Entries to drop, given counts from `selection_counts` (plain integers or traced scalars).

    Args:
        score: `[O,I]`.
        group: see `select_mask`.
        counts: entries to drop.
        axes: how the matrix is sharded over the active mesh; None: not sharded.

    Returns:
        bool `[O,I]`, the same on any mesh.
    """
    if axes is None:
        return _drop(score, counts, group, WHOLE)
    here = PartitionSpec(axes.rows, axes.columns or None)
    # An axis of one device splits nothing.
    mesh = active_mesh()
    columns = tuple(axis for axis in axes.columns if mesh is None or mesh.shape[axis] > 1)
    local = functools.partial(_drop, group=group, split=Split(axes.rows, columns))
    counts = jax.tree.map(jnp.int32, counts)
    specs = (here, PartitionSpec())
    return jax.shard_map(local, in_specs=specs, out_specs=here, check_vma=False)(score, counts)


def _drop(score: Array, counts: Counts, group: str, split: Split) -> Array:
    bits = score_bits(score)
    pattern = parse_pattern(group)
    if pattern is not None:
        blocks = bits.reshape(bits.shape[0], -1, pattern[1])
        return lowest(blocks, counts.total).reshape(bits.shape)
    if group == "row":
        return lowest(bits, counts.total, 1, split)
    if group == "matrix":
        return lowest(bits, counts.total, 2, split)
    if group == "slab":
        return _lowest_of_slabs(bits, counts, split)
    certain = lowest(bits, counts.row_low, 1, split)
    possible = lowest(bits, counts.row_high, 1, split) & ~certain
    open_bits = jnp.where(possible, bits, jnp.uint32(_NEVER))
    certain_total = _sum_over(jnp.sum(certain, dtype=jnp.int32), split.rows + split.columns)
    return certain | lowest(open_bits, counts.total - certain_total, 2, split)


def _lowest_of_slabs(bits: Array, counts: Counts, split: Split) -> Array:
    out_dim, in_dim = bits.shape
    if split.columns and in_dim % SLAB:
        raise InputError(
            f"prune.group slab: expected whole slabs of {SLAB} inputs on every device, found {in_dim} inputs on each; "
            "lower mesh.tensor"
        )
    width = min(SLAB, in_dim)
    end = in_dim - in_dim % width
    slabs = jnp.swapaxes(bits[:, :end].reshape(out_dim, -1, width), 0, 1)
    marked = jnp.swapaxes(lowest(slabs, counts.total, 2, Split(split.rows)), 0, 1).reshape(out_dim, end)
    if end == in_dim:
        return marked
    return jnp.concatenate([marked, lowest(bits[:, end:], counts.rest, 2, Split(split.rows))], axis=1)


def select_mask(score: Array, sparsity: float, group: str = "row", bound: float | None = None) -> Array:
    """Keeps the highest scores.

    Drops exactly floor(sparsity * n + 1e-9) of the n entries of every group; of equal scores, the lower index first.

    Args:
        score: `[O,I]` of one matrix (for several, `jax.vmap`); NaN counts as the highest.
        sparsity: share to drop, in [0, 1); static.
        group: which entries compete: "row" (Wanda), "matrix", "slab" (all rows of 128 consecutive inputs), "bounded"
            (the matrix, but every row's sparsity within `bound` of `sparsity`, rounded outwards to whole entries), or
            "N:M" (keep N of M consecutive inputs; sparsity must be 1 - N/M, or 0); static.
        bound: see "bounded".

    Returns:
        bool `[O,I]`, True = kept.

    Raises:
        InputError: sparsity outside [0, 1), an unknown group, a pattern that does not fit, scores of several matrices.
    """
    if score.ndim != 2:
        raise InputError(f"select_mask: expected the scores [O,I] of one matrix, found {score.shape}; use jax.vmap")
    return ~drop_by_counts(score, group, selection_counts(score.shape, sparsity, group, bound))
