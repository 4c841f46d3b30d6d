"""One update: equal however the batch is cut or packed, and of the adapters alone."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import TrainConfig
from efx_jax.data.batches import Batch, make_batch, pad_batch
from efx_jax.data.packing import packed_batch
from efx_jax.data.tokens import Tokenized
from efx_jax.lora import Adapters, init_lora
from efx_jax.model.spec import ModelSpec, init_params, spec_from_config
from efx_jax.training.schedule import optimizer
from efx_jax.training.state import TrainState, init_train_state, trainable
from efx_jax.training.step import StepOptions, summed_loss, train_step

KEY = jax.random.key(7)
TX = optimizer(TrainConfig(learning_rate=1e-2), 100)
OPTIONS = StepOptions()
FORWARDS = ("exact", "ste", "frozen", "dense")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_from_config(
        {
            "model_type": "llama",
            "vocab_size": 31,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "rms_norm_eps": 1e-5,
        }
    )


@pytest.fixture(scope="module")
def params(spec: ModelSpec) -> dict[str, Any]:
    # Ten times the usual initial weights: gradients that are large against float32's rounding.
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 10 * leaf, init_params(jax.random.key(0), spec))


@pytest.fixture(scope="module")
def adapters(params: dict[str, Any], spec: ModelSpec) -> Adapters:
    """Adapters in the middle of training: B is not zero."""
    fresh = init_lora(jax.random.key(1), params, spec, 3)
    lora_b = {
        name: 0.1 * jax.random.normal(jax.random.fold_in(KEY, index), leaf.shape)
        for index, (name, leaf) in enumerate(fresh.lora_b.items())
    }
    return dataclasses.replace(fresh, lora_b=lora_b)


@pytest.fixture(scope="module")
def masks(params: dict[str, Any]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(2)
    layers = params["layers"]
    return {name: jnp.asarray(rng.uniform(size=layers[name].shape) < 0.5) for name in layers if name.endswith("_proj")}


@pytest.fixture(scope="module")
def examples() -> list[Tokenized]:
    """Four sequences of 2 to 29 inputs of which 1 to 27 carry loss: micro-batches of very different weight."""
    rng = np.random.default_rng(4)
    sizes = ((30, 3), (22, 20), (3, 2), (6, 4))
    return [Tokenized(rng.integers(0, 31, n).astype(np.int32), np.arange(n) >= first) for n, first in sizes]


@pytest.fixture(scope="module")
def batch(examples: list[Tokenized]) -> Batch:
    return pad_batch(examples, 4, 32)


def fresh(adapters: Adapters) -> TrainState:
    """A state of its own: a step consumes the buffers of the one that it is given."""
    return init_train_state(jax.tree.map(jnp.copy, adapters), TX)


def close(found: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


def test_accumulated_micro_batches_equal_one_large_batch(spec, params, adapters, batch) -> None:
    cut = dataclasses.replace(OPTIONS, micro_batches=4)
    whole_state, whole = train_step(fresh(adapters), params, None, batch, KEY, spec, TX, OPTIONS)
    cut_state, cut_metrics = train_step(fresh(adapters), params, None, batch, KEY, spec, TX, cut)
    close(cut_metrics, whole)
    # Adam's first moment is a tenth of the clipped gradient: unlike the update, it shows the gradient's size.
    close(cut_state.opt_state, whole_state.opt_state, rtol=2e-5)


def test_loss_and_gradient_are_means_over_the_tokens_that_carry_loss(spec, params, adapters, batch) -> None:
    _, metrics = train_step(fresh(adapters), params, None, batch, KEY, spec, TX, OPTIONS)
    arrays = trainable(adapters)
    count = batch["weights"].sum()
    gradient = jax.jit(jax.value_and_grad(summed_loss, has_aux=True), static_argnames=("spec", "options"))
    (nll, sums), grads = gradient(arrays, adapters, params, None, batch, KEY, spec=spec, options=OPTIONS)
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(leaf / count))) for leaf in jax.tree.leaves(grads)))
    found = [float(metrics[name]) for name in ("loss", "entropy", "grad_norm", "tokens")]
    np.testing.assert_allclose(found, [nll / count, sums["entropy"] / count, norm, 29 + 21 + 2 + 5], rtol=1e-5)


def test_only_adapters_and_their_moments_change(spec, params, adapters, batch) -> None:
    before = jax.tree.map(np.array, params)
    state, metrics = train_step(fresh(adapters), params, None, batch, KEY, spec, TX, OPTIONS)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), before)
    assert int(state.step) == 1
    squares = [float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(trainable(state.adapters))]
    assert float(metrics["adapter_norm"]) == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    for kind in ("lora_a", "lora_b"):
        for name, leaf in getattr(state.adapters, kind).items():
            assert not np.array_equal(leaf, getattr(adapters, kind)[name]), name


def test_fresh_adapters_learn_b_first(spec, params, batch) -> None:
    start = init_lora(jax.random.key(1), params, spec, 3)
    state, _ = train_step(fresh(start), params, None, batch, KEY, spec, TX, OPTIONS)
    # With B = 0 the loss does not depend on A, which only decays: 1 - learning rate * weight decay.
    close(state.adapters.lora_a, jax.tree.map(lambda leaf: leaf * (1 - 1e-2 * 0.01), start.lora_a))
    assert all(np.asarray(leaf).any() for leaf in state.adapters.lora_b.values())


@pytest.mark.parametrize("mask_forward", FORWARDS)
def test_every_mask_forward_has_finite_gradients_and_learns(spec, params, adapters, masks, batch, mask_forward) -> None:
    options = dataclasses.replace(OPTIONS, mask_forward=mask_forward, remat="block")
    state, losses = fresh(adapters), []
    for _ in range(8):
        state, metrics = train_step(state, params, masks, batch, KEY, spec, TX, options)
        chex.assert_tree_all_finite(metrics)
        assert float(metrics["grad_norm"]) > 0
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1


def test_modes_agree_where_they_must_and_differ_where_they_must(spec, params, adapters, masks, batch) -> None:
    def first_loss(mask_forward: str, mask: Any) -> float:
        options = dataclasses.replace(OPTIONS, mask_forward=mask_forward, remat="block")
        return float(train_step(fresh(adapters), params, mask, batch, KEY, spec, TX, options)[1]["loss"])

    found = {mode: first_loss(mode, masks) for mode in FORWARDS}
    unmasked = float(train_step(fresh(adapters), params, None, batch, KEY, spec, TX, OPTIONS)[1]["loss"])
    assert found["ste"] == pytest.approx(found["exact"], rel=1e-6)
    assert found["dense"] == pytest.approx(unmasked, rel=1e-6)
    assert len({round(found[mode], 3) for mode in ("exact", "frozen", "dense")}) == 3


def test_dropout_depends_on_seed_and_step_alone(spec, params, adapters, batch) -> None:
    options = dataclasses.replace(OPTIONS, dropout_rate=0.3, micro_batches=2)

    def loss(seed: int, step: int) -> float:
        state = dataclasses.replace(fresh(adapters), step=jnp.int32(step))
        return float(train_step(state, params, None, batch, jax.random.key(seed), spec, TX, options)[1]["loss"])

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3


def test_a_row_draws_the_same_dropout_in_any_micro_batch(spec, params, adapters, batch) -> None:
    """So that neither memory nor mesh has a say in what is learned."""
    losses, moved = [], []
    for micro_batches in (1, 2, 4):
        options = dataclasses.replace(OPTIONS, dropout_rate=0.3, micro_batches=micro_batches)
        state, metrics = train_step(fresh(adapters), params, None, batch, KEY, spec, TX, options)
        losses.append(float(metrics["loss"]))
        moved.append(state.adapters.lora_b["up_proj"])
    plain = train_step(fresh(adapters), params, None, batch, KEY, spec, TX, OPTIONS)[1]["loss"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6) and abs(losses[0] - float(plain)) > 1e-4
    for other in moved[1:]:
        np.testing.assert_allclose(other, moved[0], rtol=1e-4, atol=1e-6)


def test_micro_batches_draw_different_dropout(spec, params, adapters, examples) -> None:
    """Two equal halves of which one carries loss: the same dropout in both would give the same loss."""
    options = dataclasses.replace(OPTIONS, dropout_rate=0.3, micro_batches=2)
    twice = pad_batch([*examples[:2], *examples[:2]], 4, 32)

    def loss(half: slice) -> float:
        weights = np.zeros_like(twice["weights"])
        weights[half] = twice["weights"][half]
        one = {**twice, "weights": weights}
        return float(train_step(fresh(adapters), params, None, one, KEY, spec, TX, options)[1]["loss"])

    assert abs(loss(slice(0, 2)) - loss(slice(2, 4))) > 1e-4


def test_the_step_compiles_once(spec, params, adapters, masks, examples) -> None:
    options = dataclasses.replace(OPTIONS, mask_forward="frozen")
    state = fresh(adapters)
    compiled = train_step._cache_size()
    for number in range(5):
        state, _ = train_step(state, params, masks, make_batch(examples, 0, number, 4, 32), KEY, spec, TX, options)
    assert int(state.step) == 5
    assert train_step._cache_size() == compiled + 1


def test_packed_equals_separate(spec, params, adapters, masks, examples, batch) -> None:
    packed = packed_batch(examples, 0, 0, 2, 32)
    assert packed["segments"].max() > 1
    assert packed["weights"].sum() == batch["weights"].sum()
    options = dataclasses.replace(OPTIONS, remat="block")
    packed_state, packed_metrics = train_step(fresh(adapters), params, masks, packed, KEY, spec, TX, options)
    state, metrics = train_step(fresh(adapters), params, masks, batch, KEY, spec, TX, options)
    close(packed_metrics, metrics)
    close(packed_state.opt_state, state.opt_state, rtol=2e-5)


def test_a_batch_without_loss_moves_nothing_but_the_decay(spec, params, adapters, batch) -> None:
    empty = {**batch, "weights": np.zeros_like(batch["weights"])}
    state, metrics = train_step(fresh(adapters), params, None, empty, KEY, spec, TX, OPTIONS)
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0)
    # AdamW's decay alone: 1 - learning rate * weight decay.
    close(trainable(state.adapters), jax.tree.map(lambda leaf: leaf * (1 - 1e-2 * 0.01), trainable(adapters)))
