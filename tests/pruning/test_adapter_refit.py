"""A from the spectrum and by turns with B, against NumPy's SVD and least squares in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.pruning.adapter_refit import alternate_a, spectral_a, with_norms_of
from efx_jax.pruning.recovery import gram_brain_surgeon
from tests.pruning.oracles import correlated_inputs, single

OUT, IN, RANK, TOKENS = 24, 16, 3, 90


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """Correlated inputs `[tokens,I]`."""
    return correlated_inputs(5, TOKENS, IN)


@pytest.fixture(scope="module")
def lost() -> np.ndarray:
    return np.random.default_rng(6).standard_normal((OUT, IN))


@pytest.fixture(scope="module")
def old_a() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((RANK, IN))


def error(product: np.ndarray, lost: np.ndarray, inputs: np.ndarray) -> float:
    return float((((product - lost) @ inputs.T) ** 2).sum())


def test_the_spectrum_gives_the_best_product_of_that_rank(
    lost: np.ndarray, inputs: np.ndarray, old_a: np.ndarray
) -> None:
    """No B A of rank R is closer to E on the inputs than the truncated SVD of E X^T (Eckart and Young)."""
    found = np.asarray(jax.jit(spectral_a)(*single(lost, inputs.T @ inputs, old_a)), np.float64)
    seen = found @ inputs.T
    lora_b = np.linalg.lstsq(seen.T, (lost @ inputs.T).T, rcond=None)[0].T
    values = np.linalg.svd(lost @ inputs.T, compute_uv=False)
    least = (values[RANK:] ** 2).sum()
    assert error(lora_b @ found, lost, inputs) <= least * (1 + 1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(old_a, axis=1), rtol=1e-5)


def test_more_rank_than_the_error_has_keeps_the_other_rows(inputs: np.ndarray) -> None:
    """Two outputs have two directions; rows of A beyond the spectrum stay the old ones."""
    rng = np.random.default_rng(8)
    old, lost = rng.standard_normal((5, IN)), rng.standard_normal((2, IN))
    found = np.asarray(jax.jit(spectral_a)(*single(lost, inputs.T @ inputs, old)))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[2:], old[2:], rtol=1e-6)
    coefficients = np.linalg.lstsq(found[:2].T.astype(np.float64), lost.T, rcond=None)[0]
    np.testing.assert_allclose(found[:2].T @ coefficients, lost.T, atol=1e-4)


def test_a_by_turns_is_least_squares_under_the_mask(lost: np.ndarray, inputs: np.ndarray, old_a: np.ndarray) -> None:
    """Its steps go towards the A that solves the masked problem exactly, and past most of the way there."""
    rng = np.random.default_rng(9)
    mask, lora_b = rng.random((OUT, IN)) < 0.5, rng.standard_normal((OUT, RANK))
    # A column of the design for every entry of A: what it adds to the outputs of all rows.
    design = np.zeros((OUT, TOKENS, RANK, IN))
    for row in range(OUT):
        design[row] = np.einsum("r,ti->tri", lora_b[row], inputs * mask[row])
    flat = design.reshape(OUT * TOKENS, RANK * IN)
    best = np.linalg.lstsq(flat, (lost @ inputs.T).reshape(-1), rcond=None)[0].reshape(RANK, IN)
    turn = jax.jit(alternate_a)
    rest = single(lora_b, mask, lost, inputs.T @ inputs)
    found, errors = jnp.asarray(old_a, jnp.float32), []
    for _ in range(4):
        errors.append(error(np.where(mask, lora_b @ np.asarray(found), 0.0), lost, inputs))
        found = turn(found, *rest)
    least = error(np.where(mask, lora_b @ best, 0.0), lost, inputs)
    assert errors[1] < errors[0]
    assert all(late <= early * (1 + 1e-5) for early, late in itertools.pairwise(errors))
    assert errors[-1] - least < 0.01 * (errors[0] - least)


def test_rows_take_norms_and_rows_of_zeros_come_back(old_a: np.ndarray) -> None:
    new = np.array([[2.0] * IN, [0.0] * IN, [-3.0] * IN])
    found = np.asarray(with_norms_of(*single(old_a, new)))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(old_a, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[1], old_a[1], rtol=1e-6)


def test_every_round_leaves_less(lost: np.ndarray, inputs: np.ndarray, old_a: np.ndarray) -> None:
    """A as it is, A from the spectrum, then by turns with B: each closer to the target under the mask."""
    mask = np.random.default_rng(10).random((OUT, IN)) < 0.5
    gram, zero = inputs.T @ inputs, np.zeros((OUT, IN))
    solve = jax.jit(gram_brain_surgeon)

    def best_b(lora_a: jax.Array) -> jax.Array:
        return solve(*single(zero), lora_a, *single(mask, gram), 1e-3, None, *single(lost))

    lora_a = [*single(old_a), spectral_a(*single(lost, gram, old_a))]
    for _ in range(2):
        lora_a.append(
            with_norms_of(*single(old_a), alternate_a(lora_a[-1], best_b(lora_a[-1]), *single(mask, lost, gram)))
        )
    found = [error(np.where(mask, np.asarray(best_b(a) @ a), 0.0), lost, inputs) for a in lora_a]
    assert all(late < early for early, late in itertools.pairwise(found)), found


@pytest.mark.parametrize("seed", range(20))
def test_a_by_turns_stays_finite_where_nothing_is_left_to_gain(seed: int) -> None:
    # With one direction and a diagonal Gram the preconditioner solves it at once.
    rng = np.random.default_rng(seed)
    a, b, lost = (jnp.asarray(rng.lognormal(sigma=3, size=shape), jnp.float32) for shape in ((1, 8), (6, 1), (6, 8)))
    gram = jnp.diag(jnp.asarray(rng.lognormal(sigma=3, size=8), jnp.float32))
    assert np.all(np.isfinite(alternate_a(a, b, jnp.ones((6, 8), bool), lost, gram)))
