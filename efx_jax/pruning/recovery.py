"""Closed-form repairs of what a mask breaks. e = U * (1 - mask) is the part dropped; A_m is A with pruned columns 0.

The surgeons return the change in units of scale * B, so that U + delta_b @ lora_a is the new effective weight and the
caller divides by the scale once. Every solve is float32 at the highest matmul precision.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efx_jax.einsum import einsum
from efx_jax.pruning.selection import lowest, score_bits
from efx_jax.shapes import require_mask, require_refit, require_shape

Array = jax.Array
_TRIES = 6


@jax.custom_batching.sequential_vmap
def matrix_cholesky(matrix: Array) -> Array:
    """Lower Cholesky factor of a large `[n,n]`, NaN where it has none; one matrix at a time, even under `vmap`.

    LAPACK's batched kernels deadlock in XLA's CPU backend when two of them run at once and hold all threads of its
    pool (jax 0.10.2 on two cores, reproduced with two batches of 64 matrices of 64 x 64).
    """
    return jnp.linalg.cholesky(matrix)


@jax.custom_batching.sequential_vmap
def matrix_solve(lower: Array, rhs: Array) -> Array:
    """X with L L^T X = rhs: `lower [n,n]`, `rhs [n,m]`; one system at a time, like `matrix_cholesky`."""
    return jax.scipy.linalg.cho_solve((lower, True), rhs)


def row_cholesky(matrix: Array) -> Array:
    """Lower Cholesky factor of a small `[R,R]`, column by column; NaN where it has none.

    Plain array operations, for thousands of rows at once under `vmap` (`matrix_cholesky` says why not LAPACK's).
    """
    rows = jnp.arange(matrix.shape[0])

    def column(k: Array, lower: Array) -> Array:
        left = matrix[:, k] - einsum("rs,s->r", lower, lower[k])
        return lower.at[:, k].set(jnp.where(rows >= k, left / jnp.sqrt(left[k]), 0.0))

    return jax.lax.fori_loop(0, matrix.shape[0], column, jnp.zeros_like(matrix))


def row_solve(lower: Array, rhs: Array) -> Array:
    """x with L L^T x = rhs: `lower [R,R]`, `rhs [R]`."""
    size = lower.shape[0]

    def forward(k: Array, y: Array) -> Array:
        return y.at[k].set((rhs[k] - jnp.sum(lower[k] * y)) / lower[k, k])

    def backward(step: Array, x: Array) -> Array:
        k = size - 1 - step
        return x.at[k].set((y[k] - jnp.sum(lower[:, k] * x)) / lower[k, k])

    y = jax.lax.fori_loop(0, size, forward, jnp.zeros_like(rhs))
    return jax.lax.fori_loop(0, size, backward, jnp.zeros_like(rhs))


def damped(factorise: Callable[[Array], Array], matrix: Array, damping: Array) -> Array:
    """Lower Cholesky factor of `matrix + damping * I`; the damping grows tenfold until the factor is finite.

    Args:
        factorise: `matrix_cholesky` or `row_cholesky`.
        matrix: symmetric `[n,n]`.
        damping: scalar >= 0.

    Returns:
        `[n,n]`, float32; after six retries the last result, finite or not (NaN for a matrix with NaN).
    """
    identity = jnp.eye(matrix.shape[0], dtype=jnp.float32)
    # A zero damping could never be raised, so a retry starts at the float32 resolution of the matrix.
    least = jnp.finfo(jnp.float32).eps * jnp.mean(jnp.diagonal(matrix)) + jnp.finfo(jnp.float32).tiny

    def factor(amount: Array) -> Array:
        return factorise(matrix + amount * identity)

    def failed(state: tuple[Array, Array, Array]) -> Array:
        tries, _, lower = state
        return (tries < _TRIES) & ~jnp.all(jnp.isfinite(lower))

    def retry(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, amount, _ = state
        amount = jnp.maximum(10 * amount, least)
        return tries + 1, amount, factor(amount)

    damping = jnp.asarray(damping, jnp.float32)
    return jax.lax.while_loop(failed, retry, (jnp.int32(0), damping, factor(damping)))[2]


def unit_diagonal(gram: Array) -> tuple[Array, Array]:
    """G `[I,I]` with its inputs scaled to a norm of 1 (an input that is always 0 stays 0), and the scales `[I]`."""
    diagonal = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(diagonal > 0, diagonal, 1.0)
    return gram / (scale[:, None] * scale[None, :]), scale


def partial_brain_surgeon(weight: Array, lora_a: Array, mask: Array, input_energy: Array, ridge: float = 1e-8) -> Array:
    """Partial Brain Surgeon (paper eqs. 3 and 4): db = -(e D A^T) (A D A^T + ridge I)^-1 per row, D = diag(energy).

    It shrinks the entries to be pruned *before* the mask is applied; under its own metric it can only add error once
    they are gone. Kept because it is the paper's.

    Args:
        weight: U `[O,I]`.
        lora_a: A `[R,I]`.
        mask: bool `[O,I]`, True = kept.
        input_energy: `[I]`, summed squared inputs (not their root, which the authors' code takes).
        ridge: absolute damping.

    Returns:
        delta_b `[O,R]`, float32.

    Raises:
        InputError: an array of another shape, or a mask that is not bool.
    """
    require_mask(mask, weight)
    require_shape("lora_a", lora_a, (lora_a.shape[0], weight.shape[1]))
    require_shape("input_energy", input_energy, (weight.shape[1],))
    weight, lora_a = weight.astype(jnp.float32), lora_a.astype(jnp.float32)
    weighted_a = lora_a * input_energy
    # The r x r system is the same for every row: one Cholesky factor serves all.
    lower = damped(row_cholesky, einsum("ri,si->rs", weighted_a, lora_a), jnp.float32(ridge))

    def row(weight_row: Array, mask_row: Array) -> Array:
        pruned = jnp.where(mask_row, 0.0, weight_row)
        return -row_solve(lower, einsum("ri,i->r", weighted_a, pruned))

    return jax.vmap(row)(weight, mask)


def gram_brain_surgeon(
    weight: Array,
    lora_a: Array,
    mask: Array,
    gram: Array,
    ridge: float = 1e-3,
    chunk_rows: int | None = None,
    target: Array | None = None,
) -> Array:
    """The closed form with the mask inside: minimises ||(db A_m - e) G^(1/2)||^2 + lambda ||db||^2 for every row.

    db = (e G A_m^T) (A_m G A_m^T + lambda I)^-1 with lambda = ridge * mean diagonal. With a target, e is its difference
    from the masked weight: target - mask * U.

    Args:
        weight: U `[O,I]`.
        lora_a: A `[R,I]`.
        mask: bool `[O,I]`, True = kept.
        gram: G = X^T X `[I,I]`.
        ridge: damping relative to the mean diagonal of the row's system.
        chunk_rows: rows solved together; the largest intermediate array is chunk_rows x R x I floats. None: all.
        target: `[O,I]`, the weight whose outputs to stay close to; U itself when None.

    Returns:
        delta_b `[O,R]`, float32. A Gram with NaN gives NaN.

    Raises:
        InputError: an array of another shape, or a mask that is not bool.
    """
    require_refit(weight, mask, gram, target)
    require_shape("lora_a", lora_a, (lora_a.shape[0], weight.shape[1]))
    weight, lora_a = weight.astype(jnp.float32), lora_a.astype(jnp.float32)
    lost = (weight if target is None else target.astype(jnp.float32)) - jnp.where(mask, weight, 0.0)
    rank = lora_a.shape[0]

    def row(operands: tuple[Array, Array]) -> Array:
        lost_row, mask_row = operands
        masked_a = jnp.where(mask_row, lora_a, 0.0)
        a_gram = einsum("ri,ij->rj", masked_a, gram)
        system = einsum("rj,sj->rs", a_gram, masked_a)
        rhs = einsum("rj,j->r", a_gram, lost_row)
        mean = jnp.trace(system) / rank
        # A row that keeps nothing A can reach has a zero system and nothing to solve for. Its damping is 1, since a
        # system that cannot be factored would make all rows of its chunk retry.
        lower = damped(row_cholesky, system, jnp.where(mean == 0, 1.0, ridge * mean))
        return jnp.where(mean == 0, 0.0, row_solve(lower, rhs))

    return jax.lax.map(row, (lost, mask), batch_size=min(chunk_rows or weight.shape[0], weight.shape[0]))


def dense_path_shift(gram: Array, cross: Array, ridge: float = 0.3) -> Array:
    """F `[I,I]` such that W + W F, on the current inputs, best reproduces W's outputs behind the old blocks.

    F = (C - G) (G + ridge diag(G))^-1, C = X_d^T X: least squares for X (W + W F)^T = X_d W^T, shrunk towards W. This
    is the asymmetric calibration of GPTAQ (arXiv 2504.02692), for all entries at once.

    Args:
        gram: G = X^T X `[I,I]`, X the current inputs.
        cross: C = X_d^T X `[I,I]`, X_d the inputs behind the blocks as they were before the event.
        ridge: relative to the diagonal of G. Without it a small number of tokens is overfitted, and every block adds to
            what the next one has to correct.
    """
    gram, cross = gram.astype(jnp.float32), cross.astype(jnp.float32)
    unit, scale = unit_diagonal(gram)
    lower = damped(matrix_cholesky, unit, jnp.float32(ridge))
    drift = (cross - gram) / scale[None, :]
    return matrix_solve(lower, drift.T).T / scale[None, :]


def admm_update(
    weight: Array,
    mask: Array,
    gram: Array,
    target: Array | None = None,
    steps: int = 30,
    damping: float = 1e-2,
) -> Array:
    """Refits the kept weights to the outputs of `target` by ADMM (arXiv 2401.02938).

    Minimises ||(mask * V - target) G^(1/2)|| over V. Inputs are scaled so that G has a unit diagonal, and rho = 1, so
    that one inverse serves all rows and steps.

    Args:
        weight: U `[O,I]`, the dense target when `target` is None.
        mask: bool `[O,I]`, True = kept.
        gram: G = X^T X `[I,I]`.
        target: `[O,I]`, a weight whose outputs are wanted: from the model before the event, or from a dense teacher.
        steps: iterations, static.
        damping: added to the unit diagonal of the scaled G.

    Returns:
        The new weight `[O,I]`, float32, exactly 0 where pruned.

    Raises:
        InputError: an array of another shape, or a mask that is not bool.
    """
    return admm_refit(weight, mask, gram, target, steps, damping)[0]


def admm_refit(
    weight: Array,
    mask: Array,
    gram: Array,
    target: Array | None = None,
    steps: int = 30,
    damping: float = 1e-2,
    refine: int = 0,
    pattern: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    """As `admm_update`, but in its first `refine` steps every row chooses again which entries it keeps.

    A row keeps as many as its mask does: those with the largest |V + Y|, ADMM's weight times the norm of its input.
    A score sees each entry alone; this weight already compensates for what is dropped. Where the target has no
    more nonzero entries than are to be kept, as under the mask of an earlier event, all of these stay and the mask
    says which others come back: there ADMM's values are rounding errors, which would be ranked.

    Args:
        weight: as in `admm_update`.
        mask: as in `admm_update`.
        gram: as in `admm_update`.
        target: as in `admm_update`.
        steps: as in `admm_update`.
        damping: as in `admm_update`.
        refine: number of these steps, static; 0 leaves the mask as it is.
        pattern: (N, M) if the mask keeps N of every M consecutive inputs: the new one keeps as many of them; static.

    Returns:
        The new weight `[O,I]`, float32, exactly 0 where pruned, and the mask, bool `[O,I]`.

    Raises:
        InputError: as `admm_update`.
    """
    require_refit(weight, mask, gram, target)
    unit, scale = unit_diagonal(gram.astype(jnp.float32))
    # An input that is always 0 has no norm, whatever its scale: none of its entries is worth keeping.
    is_alive = jnp.diagonal(gram) > 0
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    gram = unit + damping * identity
    goal = (weight if target is None else target).astype(jnp.float32) * scale
    rho = 1.0
    inverse = matrix_solve(matrix_cholesky(gram + rho * identity), identity)
    goal_gram = einsum("oi,ij->oj", goal, gram)
    within = (mask.shape[0], -1) if pattern is None else (mask.shape[0], -1, pattern[1])
    dropped = jnp.sum(~mask.reshape(within), axis=-1, keepdims=True, dtype=jnp.int32)
    asked_for = ((goal != 0) & is_alive).reshape(within)
    has_room = jnp.sum(~asked_for, axis=-1, keepdims=True, dtype=jnp.int32) >= dropped
    rank = jnp.where(asked_for, 2, mask.reshape(within)).astype(jnp.uint32)

    def choose(wanted: Array) -> Array:
        bits = score_bits(jnp.where(is_alive, jnp.abs(wanted), 0.0)).reshape(within)
        return ~lowest(jnp.where(has_room, rank, bits), dropped).reshape(mask.shape)

    def step(v: Array, y: Array, mask: Array) -> tuple[Array, Array]:
        z = jnp.where(mask, v + y, 0.0)
        y = y + v - z
        return einsum("oi,ij->oj", goal_gram + rho * (z - y), inverse), y

    def choosing_step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mask = choose(state[0] + state[1])
        return *step(state[0], state[1], mask), mask

    v, y = goal, jnp.zeros_like(goal)
    if refine:
        v, y, mask = jax.lax.fori_loop(0, refine, choosing_step, (v, y, mask))
    v, y = jax.lax.fori_loop(refine, steps, lambda _, state: step(state[0], state[1], mask), (v, y))
    return jnp.where(mask, (v + y) / scale, 0.0), mask
