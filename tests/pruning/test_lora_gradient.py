"""LoRAPrune's criterion: the estimate of the gradient against the true one, and the score of a whole model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.pruning.lora_gradient import estimated_gradient, lora_gradient_importance, lora_gradient_score

SCALE = 1.7
RNG = np.random.default_rng(0)
INPUTS, TARGETS = RNG.standard_normal((9, 6)), RNG.standard_normal((9, 5))
WEIGHT, LORA_A, LORA_B = RNG.standard_normal((5, 6)), RNG.standard_normal((2, 6)), RNG.standard_normal((5, 2))


def loss(weight: Any, lora_a: Any, lora_b: Any) -> jax.Array:
    """A mean loss that is not quadratic in the weight."""
    outputs = INPUTS @ (weight + SCALE * lora_b @ lora_a).T
    return jnp.mean(jnp.log(jnp.cosh(outputs - TARGETS)))


def gradients(lora_b: np.ndarray) -> tuple[np.ndarray, ...]:
    """(by W, by A, by B) at WEIGHT, LORA_A and `lora_b`."""
    return tuple(np.asarray(g, np.float64) for g in jax.grad(loss, argnums=(0, 1, 2))(WEIGHT, LORA_A, lora_b))


def test_the_estimate_is_the_projected_gradient_of_the_effective_weight() -> None:
    full, grad_a, grad_b = gradients(LORA_B)
    a, b = LORA_A, LORA_B
    expected = SCALE * (full @ a.T @ a + b @ b.T @ full) - SCALE**2 * full @ a.T @ b.T @ full
    np.testing.assert_allclose(estimated_gradient(a, b, grad_a, grad_b), expected, rtol=1e-4, atol=1e-6)


def test_before_the_first_update_only_the_rows_of_a_see_the_gradient() -> None:
    full, grad_a, grad_b = gradients(np.zeros_like(LORA_B))
    assert not grad_a.any()
    found = estimated_gradient(LORA_A, np.zeros_like(LORA_B), grad_a, grad_b)
    np.testing.assert_allclose(found, SCALE * full @ LORA_A.T @ LORA_A, rtol=1e-4, atol=1e-6)
    # An A that sees every direction alike shows the gradient itself.
    whole = np.linalg.qr(RNG.standard_normal((6, 6)))[0]
    found = estimated_gradient(whole, np.zeros((5, 6)), np.zeros((6, 6)), full @ whole.T)
    np.testing.assert_allclose(found, full, rtol=1e-4, atol=1e-6)


def test_the_estimate_is_what_one_step_of_plain_descent_takes_from_the_product() -> None:
    _, grad_a, grad_b = gradients(LORA_B)
    step = LORA_B @ LORA_A - (LORA_B - grad_b) @ (LORA_A - grad_a)
    np.testing.assert_allclose(estimated_gradient(LORA_A, LORA_B, grad_a, grad_b), step, rtol=1e-4, atol=1e-6)


def test_along_the_estimate_the_loss_falls_as_the_adapter_gradients_say() -> None:
    """A central difference in float64: to first order only the terms without a product of gradients count."""
    _, grad_a, grad_b = gradients(LORA_B)
    first_order = np.asarray(estimated_gradient(LORA_A, LORA_B, grad_a, grad_b), np.float64) + grad_b @ grad_a

    def value(step: float) -> float:
        outputs = INPUTS @ (WEIGHT + SCALE * LORA_B @ LORA_A - step * SCALE * first_order).T
        return float(np.mean(np.log(np.cosh(outputs - TARGETS))))

    slope = (value(-1e-4) - value(1e-4)) / 2e-4
    np.testing.assert_allclose(slope, np.sum(grad_a**2) + np.sum(grad_b**2), rtol=1e-4)


def test_a_loss_summed_instead_of_averaged_is_another_criterion() -> None:
    _, grad_a, grad_b = gradients(LORA_B)
    mean = np.asarray(estimated_gradient(LORA_A, LORA_B, grad_a, grad_b))
    summed = np.asarray(estimated_gradient(LORA_A, LORA_B, 45 * grad_a, 45 * grad_b))
    assert np.any(np.argsort(np.abs(mean), axis=None) != np.argsort(np.abs(summed), axis=None))


def test_the_score_is_the_estimate_times_the_effective_weight_entry_by_entry() -> None:
    rng = np.random.default_rng(1)
    grad_a, grad_b = rng.standard_normal(LORA_A.shape), rng.standard_normal(LORA_B.shape)
    found = np.asarray(lora_gradient_score(jnp.asarray(WEIGHT), LORA_A, LORA_B, grad_a, grad_b, SCALE))
    assert found.dtype == np.float32
    for o in range(5):
        for i in range(6):
            ranks = range(2)
            g = sum(grad_b[o, r] * LORA_A[r, i] + LORA_B[o, r] * grad_a[r, i] for r in ranks)
            g -= sum(grad_b[o, r] * grad_a[r, i] for r in ranks)
            u = WEIGHT[o, i] + SCALE * sum(LORA_B[o, r] * LORA_A[r, i] for r in ranks)
            assert found[o, i] == pytest.approx(abs(g * u), rel=1e-4)


def test_a_whole_model_is_scored_by_name(llama: Any) -> None:
    adapters, layers = llama.adapters, llama.params["layers"]
    fake = {kind: {n: 2 * leaf for n, leaf in getattr(adapters, kind).items()} for kind in ("lora_a", "lora_b")}
    found = lora_gradient_importance(layers, adapters, fake, ("k_proj", "down_proj"))
    assert set(found) == {"k_proj", "down_proj"}
    for name, scores in found.items():
        for layer, score in enumerate(scores):
            a, b = adapters.lora_a[name][layer], adapters.lora_b[name][layer]
            wanted = lora_gradient_score(layers[name][layer], a, b, 2 * a, 2 * b, adapters.scale)
            np.testing.assert_allclose(score, wanted, rtol=1e-5, atol=1e-6)


def test_a_linear_without_an_adapter_is_refused_with_one_line(llama: Any) -> None:
    adapters = Adapters(lora_a={}, lora_b={}, scale=2.0)
    with pytest.raises(InputError, match="found none on q_proj; add them to lora.targets") as caught:
        lora_gradient_importance(llama.params["layers"], adapters, {}, ("q_proj",))
    assert "\n" not in str(caught.value)
