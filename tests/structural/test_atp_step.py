"""ATP's two updates, three steps of each replayed from their definitions, and what they lead to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efx_jax.lora import Adapters, merge
from efx_jax.model.decoder import forward
from efx_jax.structural.generator import Generator, init_generator, unit_logits
from efx_jax.structural.losses import group_norms, lasso_strength, proximal_step
from efx_jax.structural.slicing import slice_model
from efx_jax.structural.units import units_of
from efx_jax.training.atp import adapter_step, generator_optimizer, generator_step, init_generator_state
from efx_jax.training.state import init_train_state, trainable
from efx_jax.training.step import StepOptions
from tests.tiers import few_of

pytestmark = pytest.mark.slow

KEY, OPTIONS, RATIO = jax.random.key(7), StepOptions(), 0.4
SPACES = ("paper", "sliceable")
SCHEDULE = optax.constant_schedule(1e-2)
# Adam would make full steps of the rounding where a gradient is next to nothing.
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(SCHEDULE, momentum=0.9))
GENERATOR_TX = generator_optimizer(1e-2)
new_generator = jax.jit(init_generator, static_argnames=("spec", "space"))


@jax.jit
def update(grads: Any, opt_state: Any, arrays: Any) -> tuple[Any, Any]:
    updates, opt_state = TX.update(grads, opt_state, arrays)
    return optax.apply_updates(arrays, updates), opt_state


@pytest.fixture(scope="module")
def tiny(make_tiny: Callable) -> Any:
    return make_tiny("qwen2")


@pytest.fixture(scope="module")
def batch(tiny: Any) -> dict[str, jax.Array]:
    rng = np.random.default_rng(9)
    weights = np.ones(tiny.tokens.shape, np.float32)
    weights[:, :2] = 0
    lengths = np.full(len(tiny.tokens), tiny.tokens.shape[1], np.int32)
    arrays = {"tokens": tiny.tokens, "targets": rng.integers(0, 31, tiny.tokens.shape), "weights": weights}
    return jax.tree.map(jnp.asarray, arrays | {"lengths": lengths})


def fresh_generator(tiny: Any, space: str) -> Generator:
    """One whose units are undecided, so that the masks of every draw differ."""
    generator = new_generator(jax.random.key(1), tiny.spec, space)
    undecided = {kind: 8 * leaf for kind, leaf in generator.weights["units"].items()}
    return generator.replace(weights=generator.weights | {"units": undecided})


def mean_nll(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch["weights"]) / jnp.sum(batch["weights"])


def replayed_loss(
    weights: Any, generator: Generator, step: int, tiny: Any, space: str, batch: dict[str, jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The generator's loss from the definitions: whole merged rows times masks, p counted by entries."""
    logits = unit_logits(generator.replace(weights=weights))
    key = jax.random.fold_in(KEY, step)
    layers = dict(merge(tiny.params, tiny.adapters, None)["layers"])
    kept = total = jnp.float32(0)
    for index, kind in enumerate(sorted(logits)):
        noise = jax.random.gumbel(jax.random.fold_in(key, index), logits[kind].shape)
        soft = 1 / (1 + jnp.exp(-(logits[kind] + noise + 3.0) / 0.4))
        hard = jnp.where(soft >= 0.5, 1.0, 0.0) + soft - jax.lax.stop_gradient(soft)
        units = units_of(tiny.spec, space)[kind]
        touched = {"key_dims": ("q_proj", "k_proj"), "value_dims": ("v_proj",), "heads": ("v_proj",)}
        for name in touched.get(kind, ("up_proj",)):
            factor = jnp.square(soft) if kind == "hidden" else soft
            layers[name] = layers[name] * factor[:, units.rows[name], None]
            if f"{name}_bias" in layers:
                layers[f"{name}_bias"] = layers[f"{name}_bias"] * factor[:, units.rows[name]]
        for name, lines in [*units.rows.items(), *units.columns.items()]:
            each = layers[name].size / layers[name].shape[0] / len(lines)
            kept += each * jnp.sum(hard[:, lines])
            total += layers[name].size
    nll = mean_nll(forward({**tiny.params, "layers": layers}, tiny.tokens, tiny.spec), batch)
    fraction, target = kept / total, 1 - RATIO
    return nll + 5 * jnp.abs(jnp.log(fraction / target)), (nll, fraction)


@pytest.mark.parametrize("space", few_of(SPACES, "sliceable"))
def test_three_generator_steps_follow_the_definition(space: str, tiny: Any, batch: dict[str, jax.Array]) -> None:
    generator = fresh_generator(tiny, space)
    state = init_generator_state(fresh_generator(tiny, space), TX)
    weights, opt_state = generator.weights, TX.init(generator.weights)
    gradient = jax.jit(
        jax.value_and_grad(
            lambda weights, step: replayed_loss(weights, generator, step, tiny, space, batch), has_aux=True
        )
    )
    seen = set()
    for step in range(3):
        state, metrics = generator_step(
            state, tiny.params, tiny.adapters, batch, KEY, RATIO, tiny.spec, space, TX, OPTIONS
        )
        (loss, (nll, kept)), grads = gradient(weights, step)
        weights, opt_state = update(grads, opt_state, weights)
        for name, expected in {"loss": loss, "nll": nll, "kept": kept, "grad_norm": optax.tree.norm(grads)}.items():
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-4)
        for ours, theirs in zip(jax.tree.leaves(state.generator.weights), jax.tree.leaves(weights), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        seen.add(float(kept))
    assert len(seen) == 3 and int(state.step) == 3
    np.testing.assert_array_equal(state.generator.embeddings, generator.embeddings)


def test_the_generator_learns_the_same_in_micro_batches(tiny: Any, batch: dict[str, jax.Array]) -> None:
    """Rows of unequal numbers of loss-carrying tokens, so that no mean of means will do."""
    uneven = batch | {"weights": batch["weights"].at[1, :6].set(0)}
    found = []
    for passes in (1, 2):
        options = dataclasses.replace(OPTIONS, micro_batches=passes)
        state = init_generator_state(fresh_generator(tiny, "sliceable"), TX)
        found.append(
            generator_step(state, tiny.params, tiny.adapters, uneven, KEY, RATIO, tiny.spec, "sliceable", TX, options)
        )
    for whole, parts in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradient_reaches_every_weight_of_the_generator(tiny: Any, batch: dict[str, jax.Array]) -> None:
    state = init_generator_state(fresh_generator(tiny, "sliceable"), GENERATOR_TX)
    state, metrics = generator_step(
        state, tiny.params, tiny.adapters, batch, KEY, RATIO, tiny.spec, "sliceable", GENERATOR_TX, OPTIONS
    )
    assert float(metrics["grad_norm"]) > 0
    # Adam's first moment after one update is a tenth of the gradient. Some of ReLU's inputs sleep.
    _, (adam, *_) = state.opt_state
    assert min(jax.tree.leaves(jax.tree.map(lambda leaf: float(np.mean(np.asarray(leaf) != 0)), adam.mu))) > 0.5


def test_generator_reaches_the_ratio(tiny: Any, batch: dict[str, jax.Array]) -> None:
    state = init_generator_state(init_generator(jax.random.key(1), tiny.spec, "sliceable"), GENERATOR_TX)
    kept = []
    for _ in range(120):
        state, metrics = generator_step(
            state, tiny.params, tiny.adapters, batch, KEY, RATIO, tiny.spec, "sliceable", GENERATOR_TX, OPTIONS
        )
        kept.append(float(metrics["kept"]))
    np.testing.assert_allclose(kept[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.mean(kept[-20:]), 1 - RATIO, atol=0.1)


def replayed_nll(arrays: Any, adapters: Adapters, masked: Any, tiny: Any, batch: dict[str, jax.Array]) -> jax.Array:
    whole = dataclasses.replace(adapters, lora_a=arrays["lora_a"], lora_b=arrays["lora_b"])
    return mean_nll(forward(masked, tiny.tokens, tiny.spec, whole), batch)


@pytest.mark.parametrize("space", few_of(SPACES, "sliceable"))
def test_three_adapter_steps_follow_the_definition(
    space: str, tiny: Any, batch: dict[str, jax.Array], draw_masks: Callable, zero_by_hand: Callable
) -> None:
    arrays = jax.tree.map(jnp.copy, trainable(tiny.adapters))
    opt_state, adapters = TX.init(arrays), tiny.adapters
    state = init_train_state(jax.tree.map(jnp.copy, tiny.adapters), TX)
    gradient = jax.jit(
        jax.value_and_grad(lambda arrays, masked: replayed_nll(arrays, tiny.adapters, masked, tiny, batch))
    )
    shrink = jax.jit(proximal_step, static_argnames=("spec", "space"))
    for step in range(3):
        # ATP draws anew at every step.
        unit_masks = draw_masks(tiny.spec, space, seed=step)
        on_device = jax.tree.map(jnp.asarray, unit_masks)
        state, metrics = adapter_step(
            state, tiny.params, on_device, batch, KEY, 3000, tiny.spec, space, TX, SCHEDULE, OPTIONS
        )
        # Dropped rows of the frozen weights are 0 and the adapters whole: y = x (mask * W)^T + scale (x A^T) B^T.
        loss, grads = gradient(arrays, zero_by_hand(tiny.params, unit_masks, tiny.spec))
        arrays, opt_state = update(grads, opt_state, arrays)
        adapters = dataclasses.replace(adapters, lora_a=arrays["lora_a"], lora_b=arrays["lora_b"])
        adapters = shrink(adapters, on_device, tiny.spec, space, lasso_strength(step, 3000), 1e-2)
        arrays = trainable(adapters)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(adapters), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_emptied_adapters_make_the_trained_function_the_sliced_one(
    tiny: Any, batch: dict[str, jax.Array], draw_masks: Callable, zero_by_hand: Callable
) -> None:
    unit_masks = draw_masks(tiny.spec, "sliceable")
    on_device = jax.tree.map(jnp.asarray, unit_masks)
    state = init_train_state(jax.tree.map(jnp.copy, tiny.adapters), TX)
    for _ in range(4):
        state, _ = adapter_step(
            state, tiny.params, on_device, batch, KEY, 4, tiny.spec, "sliceable", TX, SCHEDULE, OPTIONS
        )
    for kind, units in units_of(tiny.spec, "sliceable").items():
        assert np.all(np.asarray(group_norms(state.adapters, units))[~unit_masks[kind]] == 0)
    params, adapters, spec = slice_model(tiny.params, state.adapters, unit_masks, tiny.spec, "sliceable")
    run = jax.jit(forward, static_argnames="spec")
    trained = run(zero_by_hand(tiny.params, unit_masks, tiny.spec), tiny.tokens, tiny.spec, state.adapters)
    sliced = run(params, tiny.tokens, spec, adapters)
    np.testing.assert_allclose(sliced, trained, atol=1e-5 * float(jnp.max(jnp.abs(trained))), rtol=0)
