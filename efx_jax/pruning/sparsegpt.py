"""SparseGPT (arXiv 2301.00774): columns are pruned from left to right, and later columns compensate for earlier ones.

H = G + damping is the Hessian of a row's output error, R the upper Cholesky factor of its inverse (H^-1 = R^T R). When
entry (o,i) goes, the optimal brain surgeon moves the row's later entries j > i by -(w_oi / R_ii) R_ij. The columns are
taken in slabs: which entries of a slab go is decided when the sweep reaches it, from the already updated weights.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efx_jax.einsum import einsum
from efx_jax.errors import InputError
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import linear_axes
from efx_jax.pruning.recovery import damped, matrix_cholesky
from efx_jax.pruning.selection import (
    SLAB,
    WHOLE,
    Counts,
    Split,
    drop_count,
    lowest,
    parse_pattern,
    score_bits,
    selection_counts,
)
from efx_jax.shapes import require_refit, require_shape

Array = jax.Array
Pick = Callable[[Array, Array], Array]
"""Maps the importance `[O,n]` of n columns decided together, and the index of the first, to the mask of what stays."""

DAMPING = 0.01


class Inverse(NamedTuple):
    """R, the upper Cholesky factor of the damped Gram's inverse `[I,I]`, and which inputs were ever active, `[I]`."""

    factor: Array
    alive: Array


class Sweep(NamedTuple):
    """The results of a sweep, `[O,I]` each.

    `mask`: True = kept. `weight`: float32, exactly 0 where pruned. `importance`: w^2 / R_ii^2 of every entry at the
    time it was decided on (in the units of G), 0 for an input that was never active.
    """

    mask: Array
    weight: Array
    importance: Array


def slab_width(in_dim: int, group: str, slab: int = SLAB) -> int:
    """Columns of a slab: `slab`, all of a narrower matrix, and always whole blocks of an N:M pattern."""
    pattern = parse_pattern(group)
    unit = 1 if pattern is None else pattern[1]
    return min(in_dim, max(unit, slab - slab % unit))


def slab_counts(shape: tuple[int, ...], sparsity: float, group: str, slab: int = SLAB) -> Counts:
    """The exact numbers of entries to drop: floor(sparsity * n + 1e-9) of the n entries of every group of a slab.

    Args:
        shape: (..., O, I) of the weight.
        sparsity: share to drop, in [0, 1).
        group: "matrix" (all rows of a slab compete), "row" (those of a row within it) or "N:M".
        slab: columns decided together.

    Raises:
        InputError: as `selection_counts`, and groups "slab" and "bounded".
    """
    out_dim, in_dim = shape[-2:]
    if group in ("slab", "bounded"):
        raise InputError(f"sparsegpt: expected row, matrix or N:M, found {group}; all of them act within slabs")
    whole = selection_counts(shape, sparsity, group)
    if parse_pattern(group) is not None:
        return whole
    width, rows = slab_width(in_dim, group, slab), out_dim if group == "matrix" else 1
    return Counts(drop_count(sparsity, rows * width), rest=drop_count(sparsity, rows * (in_dim % width)))


@jax.custom_batching.sequential_vmap
def _inverse_of_upper(upper: Array) -> Array:
    """Inverse of a large upper triangle `[n,n]`; one at a time, like `matrix_cholesky`."""
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(upper.shape[0], dtype=upper.dtype))


def inverse_factor(gram: Array, damping: float = DAMPING) -> Inverse:
    """R with R^T R = (G + damping * mean diagonal * I)^-1; linears that read the same input share it.

    With every index reversed, R^-1 is a lower Cholesky factor of H: H itself is never inverted. An input that was never
    active gets the mean diagonal of the others. If float32 finds no factor, the damping is raised tenfold.

    Args:
        gram: G = X^T X `[I,I]`, in any unit: masks and weights do not depend on it.
        damping: relative to the mean diagonal of the active inputs.
    """
    gram = gram.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1)
    # No active input at all: any factor will do.
    mean = jnp.where(mean > 0, mean, 1.0)
    filled = gram + jnp.diag(jnp.where(alive, 0.0, mean))
    reverse = damped(matrix_cholesky, filled[::-1, ::-1], damping * mean)[::-1, ::-1]
    return Inverse(jnp.triu(_inverse_of_upper(reverse)), alive)


def sparsegpt(
    weight: Array,
    gram: Array,
    sparsity: float,
    group: str = "matrix",
    slab: int = SLAB,
    damping: float = DAMPING,
) -> Sweep:
    """SparseGPT's mask and update of one matrix.

    Drops exactly floor(sparsity * n + 1e-9) of the n entries of every group of every slab; of equal ones, the lower
    index first.

    Args:
        weight: `[O,I]`, also what the outputs should stay close to.
        gram: G = X^T X `[I,I]`.
        sparsity: share to drop, in [0, 1); static.
        group: "matrix" (all rows x a slab's columns, the authors' choice), "row" (a row's part of a slab) or "N:M";
            static.
        slab: columns decided together; static.
        damping: see `inverse_factor`.

    Raises:
        InputError: sparsity outside [0, 1), an unknown group, a pattern that does not fit, a Gram of another shape.
    """
    require_shape("gram", gram, (weight.shape[1], weight.shape[1]))
    counts = slab_counts(weight.shape, sparsity, group, slab)
    return sparsegpt_by_counts(weight, inverse_factor(gram, damping), counts, group, slab)


def sparsegpt_by_counts(
    weight: Array, inverse: Inverse, counts: Counts, group: str, slab: int = SLAB, split: Split = WHOLE
) -> Sweep:
    """As `sparsegpt`, given counts from `slab_counts` (plain integers or traced scalars) and the factor.

    `split`: mesh axes that the rows are split over, where `weight` is one device's rows; its columns must be whole.
    """
    pattern = parse_pattern(group)
    width = slab_width(weight.shape[1], group, slab)
    together = width if pattern is None else pattern[1]

    def pick(importance: Array, _: Array) -> Array:
        count = counts.total if importance.shape[1] == together else counts.rest
        return ~lowest(score_bits(importance), count, 2 if group == "matrix" else 1, split)

    return _sweep(weight, inverse, pick, width, together)


def sparsegpt_on_mesh(name: str, weight: Array, inverse: Inverse, counts: Counts, group: str) -> Sweep:
    """As `sparsegpt_by_counts` for the matrix of linear `name`, with its rows distributed over the mesh's devices.

    During the sweep only a slab's selection counts are communicated; copies of the model repeat the same work.
    """
    if active_mesh() is None:
        return sparsegpt_by_counts(weight, inverse, counts, group)
    axes = linear_axes(name)

    def local(part: Array, inverse: Inverse, counts: Counts) -> Sweep:
        if not axes.columns:
            return sparsegpt_by_counts(part, inverse, counts, group, split=Split(axes.rows))
        rows = jax.lax.all_to_all(part, axes.columns, split_axis=0, concat_axis=1, tiled=True)
        swept = sparsegpt_by_counts(rows, inverse, counts, group, split=Split(axes.rows + axes.columns))
        back = functools.partial(jax.lax.all_to_all, axis_name=axes.columns, split_axis=1, concat_axis=0, tiled=True)
        return jax.tree.map(back, swept)

    here, everywhere = PartitionSpec(axes.rows, axes.columns or None), PartitionSpec()
    counts = jax.tree.map(jnp.int32, counts)
    specs = (here, everywhere, everywhere)
    return jax.shard_map(local, in_specs=specs, out_specs=here, check_vma=False)(weight, inverse, counts)


def obs_update(
    weight: Array, mask: Array, gram: Array, target: Array | None = None, slab: int = SLAB, damping: float = DAMPING
) -> Array:
    """The same sweep under a given mask: from left to right, what stays compensates for what is dropped.

    Args:
        weight: U `[O,I]`, the target when `target` is None.
        mask: bool `[O,I]`, True = kept.
        gram: G = X^T X `[I,I]`.
        target: `[O,I]`, where the sweep starts and what its outputs should stay close to.
        slab: columns whose errors are passed on together; changes the speed alone; static.
        damping: see `inverse_factor`.

    Returns:
        The new weight `[O,I]`, float32, exactly 0 where pruned.

    Raises:
        InputError: an array of another shape, or a mask that is not bool.
    """
    require_refit(weight, mask, gram, target)
    return obs_by_factor(weight if target is None else target, mask, inverse_factor(gram, damping), slab)


def obs_by_factor(target: Array, mask: Array, inverse: Inverse, slab: int = SLAB) -> Array:
    """As `obs_update`, given the factor; every row is independent."""
    width = min(slab, target.shape[1])

    def pick(importance: Array, first: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(mask, first, importance.shape[1], axis=1)

    return _sweep(target, inverse, pick, width, width).weight


def _sweep(weight: Array, inverse: Inverse, pick: Pick, width: int, together: int) -> Sweep:
    """All slabs of `width` columns, then the narrower rest; `together` columns are decided at a time."""
    start = jnp.where(inverse.alive, weight.astype(jnp.float32), 0.0)
    state = Sweep(jnp.ones(start.shape, bool), start, jnp.zeros_like(start))
    full, rest = divmod(weight.shape[1], width)

    def slab(number: Array, state: Sweep) -> Sweep:
        return _sweep_slab(state, inverse.factor, pick, number * width, width, together)

    state = jax.lax.fori_loop(0, full, slab, state)
    if rest:
        first = jnp.int32(full * width)
        state = _sweep_slab(state, inverse.factor, pick, first, rest, min(together, rest))
    return state


def _sweep_slab(state: Sweep, factor: Array, pick: Pick, first: Array, width: int, together: int) -> Sweep:
    """One slab: its errors update its own later columns at once, and those of later slabs in one product at the end."""
    rows = jax.lax.dynamic_slice_in_dim(factor, first, width, axis=0)
    block = jax.lax.dynamic_slice_in_dim(rows, first, width, axis=1)
    diagonal = jnp.diagonal(block)
    slab = Sweep(*(jax.lax.dynamic_slice_in_dim(array, first, width, axis=1) for array in state))

    def stretch(number: Array, carried: tuple[Sweep, Array]) -> tuple[Sweep, Array]:
        slab, errors = carried
        begin = number * together
        columns = jax.lax.dynamic_slice_in_dim(slab.weight, begin, together, axis=1)
        importance = jnp.square(columns / jax.lax.dynamic_slice_in_dim(diagonal, begin, together))
        mask = pick(importance, first + begin)
        place = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin, axis=1)
        slab = slab._replace(mask=place(slab.mask, mask), importance=place(slab.importance, importance))

        def column(place: Array, moved: tuple[Array, Array]) -> tuple[Array, Array]:
            index, (weight, errors) = begin + place, moved
            error = jnp.where(slab.mask[:, index], 0.0, weight[:, index] / diagonal[index])
            # The factor is upper triangular: earlier columns stay as they are.
            return weight - error[:, None] * block[index], errors.at[:, index].set(error)

        # From 0: with a computed start, the trip count is unknown on GPUs, which then check before every iteration.
        weight, errors = jax.lax.fori_loop(0, together, column, (slab.weight, errors))
        return slab._replace(weight=weight), errors

    slab, errors = jax.lax.fori_loop(0, width // together, stretch, (slab, jnp.zeros_like(slab.weight)))
    slab = slab._replace(weight=jnp.where(slab.mask, slab.weight, 0.0))
    state = state._replace(weight=state.weight - einsum("oi,ij->oj", errors, rows))
    return Sweep(
        *(
            jax.lax.dynamic_update_slice_in_dim(whole, part, first, axis=1)
            for whole, part in zip(state, slab, strict=True)
        )
    )
