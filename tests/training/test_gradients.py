"""Gradients and the domain pass, against jax.grad of a plain loss and NumPy for the rest."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import Config, PruneConfig
from efx_jax.data.batches import Batch, pad_batch
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, init_lora, merge
from efx_jax.model.decoder import forward
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.training.gradients import (
    as_it_stands,
    domain_importance,
    importance_bytes,
    mean_adapter_gradient,
)
from efx_jax.training.step import StepOptions
from tests.tiny import LLAMA

SPEC = dataclasses.replace(LLAMA, vocab_size=31, rms_norm_eps=1e-5)
RATES = (0.05, 0.1, 0.02)
LAMBDA = 0.1
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def params() -> Tree:
    # Twice the usual initial weights: some gradients are clipped, others are not.
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 2 * leaf, init_params(jax.random.key(0), SPEC))


@pytest.fixture(scope="module")
def adapters(params: Tree) -> Adapters:
    fresh = init_lora(jax.random.key(1), params, SPEC, 3)
    rng = np.random.default_rng(5)
    lora_b = {name: jnp.asarray(0.1 * rng.standard_normal(b.shape), jnp.float32) for name, b in fresh.lora_b.items()}
    return dataclasses.replace(fresh, lora_b=lora_b)


@pytest.fixture(scope="module")
def masks(params: Tree) -> Tree:
    rng = np.random.default_rng(2)
    return {name: jnp.asarray(rng.random(params["layers"][name].shape) < 0.5) for name in LINEARS}


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Three batches of two rows, of very different numbers of loss-carrying tokens."""
    rng = np.random.default_rng(4)
    sizes = (((30, 3), (22, 20)), ((4, 3), (6, 4)), ((12, 1), (9, 8)))
    rows = [[Tokenized(rng.integers(0, 31, n).astype(np.int32), np.arange(n) >= k) for n, k in two] for two in sizes]
    return [pad_batch(two, 2, 32) for two in rows]


def two_passes(_: Batch) -> StepOptions:
    return StepOptions(micro_batches=2, remat="block")


def plain_loss(params: Tree, adapters: Adapters | None, masks: Any, batch: Batch, weights: Any) -> jax.Array:
    """Mean negative log-likelihood of the weighted targets."""
    log_probs = jax.nn.log_softmax(forward(params, batch["tokens"], SPEC, adapters, masks))
    nll = -jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(nll * weights) / jnp.sum(weights)


def real(batch: Batch) -> np.ndarray:
    return (np.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]).astype(np.float32)


def test_the_adapter_gradient_is_that_of_the_mean_loss_over_all_batches(params, adapters, masks, batches) -> None:
    found = mean_adapter_gradient(params, adapters, masks, batches, SPEC, two_passes)
    together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    @jax.jit
    @jax.grad
    def gradient(arrays: Tree) -> jax.Array:
        moved = dataclasses.replace(adapters, **arrays)
        return plain_loss(params, moved, masks, together, together["weights"])

    expected = gradient({"lora_a": adapters.lora_a, "lora_b": adapters.lora_b})
    for kind in ("lora_a", "lora_b"):
        for name in LINEARS:
            np.testing.assert_allclose(found[kind][name], expected[kind][name], rtol=1e-4, atol=1e-6)


def replay(
    params: Tree, general: Tree, batches: list[Batch], rates: tuple[float, ...], loss_scale: float
) -> tuple[Tree, list[float]]:
    """D-Pruner's pass in NumPy, float64, on gradients by jax.grad: (importance, gradient norms)."""

    @jax.jit
    @jax.grad
    def gradient(weights: Tree, batch: Batch, targets: Any) -> jax.Array:
        return plain_loss({**params, "layers": params["layers"] | weights}, None, None, batch, targets)

    weights = {name: np.asarray(params["layers"][name], np.float64) for name in LINEARS}
    importance = {name: np.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    for batch, rate in zip(batches, rates, strict=True):
        now = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
        grads = {name: loss_scale * np.asarray(g, np.float64) for name, g in gradient(now, batch, real(batch)).items()}
        grads = {name: g + LAMBDA * 2 * rate**2 * general[name] * g**2 / 1000 for name, g in grads.items()}
        for name, g in grads.items():
            first = g * weights[name]
            importance[name] += np.abs(first + first**2 / 2000 + weights[name] ** 3)
        grads = {name: g / loss_scale for name, g in grads.items()}
        norms.append(np.sqrt(sum(np.sum(g**2) for g in grads.values())))
        factor = min(1.0, 1.0 / norms[-1])
        weights = {name: weight - rate * factor * grads[name] for name, weight in weights.items()}
    return importance, norms


@pytest.fixture(scope="module")
def general(params: Tree) -> Tree:
    """Large enough that the regulariser shows."""
    rng = np.random.default_rng(9)
    return {name: rng.uniform(0, 1e4, params["layers"][name].shape).astype(np.float32) for name in LINEARS}


def walk(params: Tree, general: Tree | None, batches: list[Batch], rates: Any, loss_scale: float) -> Tree:
    """The domain pass on a model without adapters and masks."""
    weights, rest = as_it_stands(params, None, None, "exact")
    return domain_importance(
        weights, rest, general, batches, rates, SPEC, two_passes, general_weight=LAMBDA, loss_scale=loss_scale
    )


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_three_steps_of_the_domain_pass_equal_their_replay(params, general, batches, loss_scale) -> None:
    before = jax.tree.map(np.array, params)
    general = {name: 1024 / loss_scale * values for name, values in general.items()}
    found = walk(params, general, batches, RATES, loss_scale)
    expected, norms = replay(params, general, batches, RATES, loss_scale)
    assert max(norms) > 1 > min(norms)
    for name in LINEARS:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=1e-6 * loss_scale, err_msg=name)
        np.testing.assert_array_equal(params["layers"][name], before["layers"][name])


def test_every_part_of_the_domain_pass_counts(params, general, batches) -> None:
    """The regulariser, the moves of the weights, the scale of the loss, and the tokens of the prompt."""
    whole = walk(params, general, batches, RATES, 1024.0)["k_proj"]
    unregularised = walk(params, None, batches, RATES, 1024.0)["k_proj"]
    still = walk(params, None, batches, (0.0,) * len(RATES), 1024.0)["k_proj"]
    unscaled = walk(params, general, batches, RATES, 1.0)["k_proj"]
    for one, other in ((whole, unregularised), (unregularised, still), (whole, unscaled)):
        assert float(jnp.max(jnp.abs(one / other - 1))) > 1e-2
    silent = [{**batch, "weights": np.zeros_like(batch["weights"])} for batch in batches]
    np.testing.assert_array_equal(walk(params, general, silent, RATES, 1024.0)["k_proj"], whole)


def test_a_pass_that_diverges_is_refused_with_one_line(params, batches) -> None:
    bad = {**params, "norm": params["norm"] * jnp.nan}
    with pytest.raises(InputError, match="has diverged; lower prune.domain_learning_rate") as caught:
        walk(bad, None, batches, RATES, 1.0)
    assert "\n" not in str(caught.value)


def test_the_pass_starts_from_the_model_as_it_computes(params, adapters, masks) -> None:
    masked, rest = as_it_stands(params, adapters, masks, "exact")
    dense, _ = as_it_stands(params, adapters, masks, "dense")
    frozen, _ = as_it_stands(params, adapters, masks, "frozen")
    assert set(rest["layers"]) == set(params["layers"]) - set(LINEARS)
    for name in LINEARS:
        np.testing.assert_array_equal(masked[name] == 0, ~np.asarray(masks[name]))
        np.testing.assert_array_equal(dense[name], merge(params, adapters, None)["layers"][name])
        # mask * W + scale B A
        gone = np.where(masks[name], 0, params["layers"][name])
        np.testing.assert_allclose(frozen[name], dense[name] - gone, atol=1e-6)


def test_what_computing_the_importance_takes_is_what_a_hand_counts() -> None:
    entries = {"k_proj": 100, "down_proj": 1000}
    prune = PruneConfig(targets=("k_proj",))
    found = {
        score: importance_bytes(Config(prune=dataclasses.replace(prune, score=score)), entries, 2)
        for score in ("wanda", "lora_gradient", "dpruner")
    }
    # Importance and general importance of the pruned matrix; of both matrices bfloat16 copies, gradients and their sum.
    assert found == {"wanda": 0, "lora_gradient": 400, "dpruner": 2 * 400 + 1100 * (2 + 2 + 4)}
