"""SparseGPT's sweep against the optimal brain surgeon written out: every trailing inverse, and no Cholesky factor."""

import functools
from collections.abc import Callable
from math import floor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.pruning.selection import Counts
from efx_jax.pruning.sparsegpt import (
    Sweep,
    inverse_factor,
    obs_update,
    slab_counts,
    sparsegpt,
    sparsegpt_by_counts,
)

Choose = Callable[[np.ndarray, int], np.ndarray]
OUT, TOKENS = 10, 300
DEAD = (3, 17)

sweep = jax.jit(sparsegpt, static_argnums=(2, 3, 4))
update = jax.jit(obs_update, static_argnames="slab")


def problem(in_dim: int, seed: int = 0, dead: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[O,I]` and the Gram of correlated inputs, of which `dead` are always 0; float32."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((TOKENS, in_dim)) @ (rng.standard_normal((in_dim, in_dim)) + 2 * np.eye(in_dim))
    inputs[:, list(dead)] = 0
    return rng.standard_normal((OUT, in_dim)).astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def damped_hessian(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """H in float64, and which inputs are dead."""
    hessian = gram.astype(np.float64)
    dead = np.diagonal(hessian) == 0
    mean = np.diagonal(hessian)[~dead].mean()
    hessian[dead, dead] = mean
    return hessian + 0.01 * mean * np.eye(len(hessian)), dead


def brain_surgeon(
    weight: np.ndarray, gram: np.ndarray, slab: int, together: int, choose: Choose
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask, weight and importance, column by column: what is left of column i is inverted anew every time.

    `choose` maps the importance of `together` columns and the first one's index to what goes.
    """
    hessian, dead = damped_hessian(gram)
    in_dim = weight.shape[1]
    weight = np.where(dead, 0, weight.astype(np.float64))
    trailing = [np.linalg.inv(hessian[i:, i:]) for i in range(in_dim)]
    dropped, importance = np.zeros(weight.shape, bool), np.zeros(weight.shape)
    for i in range(in_dim):
        if i % slab % together == 0:
            end = min(i + together, i - i % slab + slab, in_dim)
            for j in range(i, end):
                importance[:, j] = weight[:, j] ** 2 / trailing[j][0, 0]
            dropped[:, i:end] = choose(importance[:, i:end], i)
        for row in range(OUT):
            if dropped[row, i]:
                weight[row, i:] -= weight[row, i] / trailing[i][0, 0] * trailing[i][0]
                weight[row, i] = 0
    return ~dropped, weight, importance


def stable_lowest(values: np.ndarray, count: int) -> np.ndarray:
    marked = np.zeros(values.size, bool)
    marked[np.argsort(values, kind="stable")[:count]] = True
    return marked


def lowest_of_matrix(sparsity: float, importance: np.ndarray, _: int) -> np.ndarray:
    return stable_lowest(importance.ravel(), floor(sparsity * importance.size)).reshape(importance.shape)


def lowest_of_rows(sparsity: float, importance: np.ndarray, _: int) -> np.ndarray:
    return np.array([stable_lowest(row, floor(sparsity * row.size)) for row in importance])


CHOOSE = {"matrix": lowest_of_matrix, "row": lowest_of_rows, "2:4": lowest_of_rows, "4:8": lowest_of_rows}


def expected(weight: np.ndarray, gram: np.ndarray, sparsity: float, group: str, slab: int) -> tuple[np.ndarray, ...]:
    together = int(group.split(":")[1]) if ":" in group else slab
    return brain_surgeon(weight, gram, slab, together, functools.partial(CHOOSE[group], sparsity))


def assert_sweep(found: Sweep, wanted: tuple[np.ndarray, ...]) -> None:
    mask, weight, importance = wanted
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.weight, weight, rtol=0, atol=1e-4 * np.abs(weight).max())
    np.testing.assert_allclose(found.importance, importance, rtol=0, atol=1e-4 * importance.max())
    np.testing.assert_array_equal(np.asarray(found.weight)[~mask], 0)


@pytest.mark.parametrize("group", CHOOSE)
@pytest.mark.parametrize("in_dim", [16, 32, 40])
def test_masks_and_weights_are_the_brain_surgeons(group: str, in_dim: int) -> None:
    """One slab, whole slabs, and slabs with a rest; the first input never active in one of them."""
    weight, gram = problem(in_dim, in_dim, (0, 5) if in_dim == 32 else ())
    assert_sweep(sweep(weight, gram, 0.5, group, 16), expected(weight, gram, 0.5, group, 16))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("group", ["matrix", "row"])
def test_every_slab_loses_its_exact_share(group: str, sparsity: float) -> None:
    weight, gram = problem(40)
    found = sweep(weight, gram, sparsity, group, 16)
    assert_sweep(found, expected(weight, gram, sparsity, group, 16))
    for first, width in ((0, 16), (16, 16), (32, 8)):
        dropped = ~np.asarray(found.mask)[:, first : first + width]
        if group == "matrix":
            assert dropped.sum() == floor(sparsity * OUT * width + 1e-9)
        else:
            assert (dropped.sum(1) == floor(sparsity * width + 1e-9)).all()


def test_slabs_have_128_columns_and_whole_patterns() -> None:
    weight, gram = problem(130)
    assert_sweep(sparsegpt(weight, gram, 0.5), expected(weight, gram, 0.5, "matrix", 128))
    assert slab_counts((OUT, 130), 0.5, "matrix") == Counts(640, rest=10)
    weight, gram = problem(20)
    # Six do not divide 16: slabs of twelve.
    weight, gram = weight[:, :18], gram[:18, :18]
    by_rows = functools.partial(lowest_of_rows, 0.5)
    assert_sweep(sweep(weight, gram, 0.5, "3:6", 16), brain_surgeon(weight, gram, 12, 6, by_rows))


def test_a_given_mask_is_repaired_by_the_same_sweep() -> None:
    weight, gram = problem(40, dead=DEAD)
    mask = np.random.default_rng(5).random(weight.shape) < 0.6
    _, wanted, _ = brain_surgeon(weight, gram, 40, 40, lambda importance, first: ~mask)
    for slab in (16, 128):
        found = np.asarray(update(weight, mask, gram, slab=slab))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        np.testing.assert_array_equal(found[~mask], 0)


def test_a_sweep_under_its_own_mask_gives_its_own_weight_and_starts_from_the_target() -> None:
    weight, gram = problem(40)
    found = sweep(weight, gram, 0.5, "matrix", 16)
    again = update(weight, found.mask, gram, slab=16)
    np.testing.assert_allclose(again, found.weight, rtol=0, atol=1e-5)
    other = update(np.ones_like(weight), found.mask, gram, weight, slab=16)
    np.testing.assert_array_equal(other, again)


@pytest.mark.parametrize("group", ["matrix", "row", "2:4"])
def test_what_stays_makes_up_for_what_goes(group: str) -> None:
    """On the calibration inputs, against the same mask alone."""
    weight, gram = problem(40)
    found = sweep(weight, gram, 0.5, group, 16)

    def error(new: np.ndarray) -> float:
        left = (np.asarray(new) - weight).astype(np.float64)
        return float(np.einsum("oi,ij,oj->", left, gram.astype(np.float64), left))

    assert error(found.weight) < 0.7 * error(np.where(found.mask, weight, 0))


def test_of_equals_the_lower_index_goes_first() -> None:
    """Uncorrelated inputs of one norm: importance is w^2, of which there are three values."""
    weight = np.random.default_rng(2).integers(-1, 2, (OUT, 24)).astype(np.float32)
    found = sweep(weight, np.eye(24, dtype=np.float32), 0.45, "matrix", 16)
    for first, end in ((0, 16), (16, 24)):
        part = np.abs(weight[:, first:end])
        wanted = stable_lowest(part.ravel(), floor(0.45 * part.size)).reshape(part.shape)
        np.testing.assert_array_equal(~np.asarray(found.mask)[:, first:end], wanted)
    np.testing.assert_array_equal(found.weight, weight * np.asarray(found.mask))


def test_inputs_that_were_never_active_lose_their_weights() -> None:
    weight, gram = problem(24, dead=DEAD)
    found = sweep(weight, gram, 0.5, "matrix", 16)
    np.testing.assert_array_equal(np.asarray(found.weight)[:, list(DEAD)], 0)
    np.testing.assert_array_equal(np.asarray(found.importance)[:, list(DEAD)], 0)
    assert not np.asarray(found.mask)[:, list(DEAD)].any()
    nothing = sweep(weight, np.zeros_like(gram), 0.5, "matrix", 16)
    assert np.isfinite(nothing.importance).all() and not np.any(nothing.weight)


def test_fewer_tokens_than_inputs_and_any_unit_of_the_gram_will_do() -> None:
    rng = np.random.default_rng(7)
    inputs = rng.standard_normal((8, 24)).astype(np.float32)
    weight = rng.standard_normal((OUT, 24)).astype(np.float32)
    gram = inputs.T @ inputs
    assert_sweep(sweep(weight, gram, 0.5, "matrix", 16), expected(weight, gram, 0.5, "matrix", 16))
    # A power of two, so that roundings are the same.
    scaled = sweep(weight, 2.0**-20 * gram, 0.5, "matrix", 16)
    np.testing.assert_array_equal(scaled.weight, sweep(weight, gram, 0.5, "matrix", 16).weight)


def test_the_factor_is_that_of_the_inverse_and_its_damping_is_raised_where_there_is_none() -> None:
    _, gram = problem(24, dead=DEAD)
    factor, alive = jax.jit(inverse_factor)(gram)
    hessian, dead = damped_hessian(gram)
    inverse = np.linalg.inv(hessian)
    np.testing.assert_array_equal(alive, ~dead)
    np.testing.assert_array_equal(np.tril(factor, -1), 0)
    np.testing.assert_allclose(factor.T @ factor, inverse, rtol=0, atol=1e-4 * np.abs(inverse).max())
    ones = jnp.ones((16, 16))
    assert np.isfinite(inverse_factor(ones, damping=0.0).factor).all()


def test_layers_are_swept_together_under_vmap_and_counts_may_be_traced() -> None:
    weights, grams = (np.stack(arrays) for arrays in zip(*(problem(40, seed) for seed in range(3)), strict=True))
    counts = slab_counts(weights.shape, 0.5, "matrix", 16)

    def layer(weight: jax.Array, gram: jax.Array, counts: Counts) -> Sweep:
        return sparsegpt_by_counts(weight, inverse_factor(gram), counts, "matrix", 16)

    found = jax.jit(jax.vmap(layer, in_axes=(0, 0, None)))(weights, grams, counts)
    for index in range(3):
        part = jax.tree.map(lambda array, index=index: array[index], found)
        assert_sweep(part, expected(weights[index], grams[index], 0.5, "matrix", 16))
    masks = jnp.asarray(found.mask)
    repaired = jax.jit(jax.vmap(functools.partial(obs_update, slab=16)))(weights, masks, grams)
    np.testing.assert_allclose(repaired, found.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sparsity", "group", "complaint"),
    [
        (1.0, "matrix", "sparsity: expected a value in \\[0, 1\\)"),
        (0.4, "2:4", "group 2:4: expected sparsity 0.5 or 0, found 0.4"),
        (0.4, "3:5", "divisible by 5, found 24"),
        (0.5, "column", "expected row, matrix, slab, bounded or N:M"),
        (0.5, "bounded", "expected row, matrix or N:M"),
        (0.5, "slab", "expected row, matrix or N:M"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_one_line(sparsity: float, group: str, complaint: str) -> None:
    weight, gram = problem(24)
    with pytest.raises(InputError, match=complaint) as caught:
        sparsegpt(weight, gram, sparsity, group)
    assert "\n" not in str(caught.value)
