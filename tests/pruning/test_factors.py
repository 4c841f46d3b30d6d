"""The Cholesky factors that recoveries solve by: LAPACK's where there is one, and damped where there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.pruning.recovery import damped, matrix_cholesky, row_cholesky, row_solve

cholesky = jax.jit(functools.partial(damped, matrix_cholesky))


def test_a_singular_matrix_gets_a_finite_factor() -> None:
    ones = np.ones((5, 5), np.float32)
    lower = np.asarray(cholesky(ones, 0.0))
    assert np.isfinite(lower).all()
    np.testing.assert_allclose(lower @ lower.T, ones, atol=1e-4)
    assert np.isfinite(cholesky(np.zeros((5, 5), np.float32), 0.0)).all()


def test_a_regular_matrix_gets_no_more_damping_than_asked() -> None:
    matrix = np.diag(np.arange(1.0, 6.0)).astype(np.float32) + 0.5
    np.testing.assert_allclose(cholesky(matrix, 0.25), np.linalg.cholesky(matrix + 0.25 * np.eye(5)), rtol=1e-5)
    both = jax.vmap(cholesky, in_axes=(0, None))(jnp.stack([jnp.ones((5, 5)), matrix]), 0.0)
    np.testing.assert_allclose(both[1], np.linalg.cholesky(matrix), rtol=1e-5)


def test_a_matrix_with_nan_ends_in_nan_and_not_in_a_loop() -> None:
    assert np.isnan(cholesky(np.full((5, 5), np.nan, np.float32), 0.0)).any()


def test_row_cholesky_equals_lapack_and_marks_what_has_no_factor() -> None:
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(20, 8, 12))
    systems = (roots @ roots.transpose(0, 2, 1)).astype(np.float32)
    rhs = rng.normal(size=(20, 8)).astype(np.float32)
    lower = jax.jit(jax.vmap(row_cholesky))(systems)
    np.testing.assert_allclose(lower, np.linalg.cholesky(systems), atol=1e-5 * np.abs(systems).max())
    solved = jax.jit(jax.vmap(row_solve))(lower, rhs)
    np.testing.assert_allclose(np.einsum("brs,bs->br", systems, solved), rhs, atol=1e-4)
    assert not np.isfinite(row_cholesky(jnp.diag(jnp.asarray([1.0, -1.0, 1.0])))).all()
