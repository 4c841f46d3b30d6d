"""D-Pruner's formulas, each against plain NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.pruning.dpruner import clip_factor, regularised_gradient, three_term_importance

RNG = np.random.default_rng(0)
WEIGHT, GRADIENT = RNG.standard_normal((4, 6)), RNG.standard_normal((4, 6))
GENERAL = RNG.uniform(0, 1e6, (4, 6))


def test_the_regulariser_adds_what_general_text_would_lose() -> None:
    found = regularised_gradient(jnp.asarray(GRADIENT), GENERAL, 0.03, 0.1)
    expected = np.empty((4, 6))
    for place, g in np.ndenumerate(GRADIENT):
        expected[place] = g + 0.1 * 2 * 0.03**2 * GENERAL[place] * g**2 / 1000
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.max(np.abs(expected - GRADIENT)) > 0.1
    np.testing.assert_array_equal(regularised_gradient(GRADIENT, GENERAL, 0.03, 0.0), np.asarray(GRADIENT, np.float32))


def test_the_importance_is_the_size_of_all_three_terms_together() -> None:
    # Gradients of a loss scaled up, where the second term counts too.
    found = three_term_importance(jnp.asarray(WEIGHT), 1000 * jnp.asarray(GRADIENT))
    expected = np.empty((4, 6))
    for place, w in np.ndenumerate(WEIGHT):
        first = 1000 * GRADIENT[place] * w
        expected[place] = abs(first + first**2 / 2000 + w**3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_importance_of_a_bfloat16_weight_is_float32() -> None:
    weight = jnp.asarray(WEIGHT, jnp.bfloat16)
    found = three_term_importance(weight, jnp.asarray(GRADIENT, jnp.bfloat16))
    assert found.dtype == jnp.float32
    exact = np.asarray(weight, np.float64), np.asarray(jnp.asarray(GRADIENT, jnp.bfloat16), np.float64)
    first = exact[0] * exact[1]
    np.testing.assert_allclose(found, np.abs(first + first**2 / 2000 + exact[0] ** 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "factor"), [(0.0, 1.0), (0.5, 1.0), (4.0, 0.25)])
def test_only_a_norm_above_the_bound_is_clipped(norm: float, factor: float) -> None:
    assert float(clip_factor(jnp.float32(norm), 1.0)) == pytest.approx(factor, rel=1e-5)
