"""One step of ATP (arXiv 2412.14426): the generator learns which units to prune, the adapters to work without them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import constrain_tree
from efx_jax.structural.generator import Generator, Weights, draw_soft, straight_through
from efx_jax.structural.losses import generator_loss, lasso_strength, proximal_step
from efx_jax.structural.units import Space, kept_fraction, soften, weight_masks, without_pruned_biases
from efx_jax.training.state import GeneratorState, TrainState
from efx_jax.training.step import Batch, StepOptions, accumulate_gradient, model_loss, train_step

Array = jax.Array


def generator_optimizer(learning_rate: float = 5e-5, clip: float = 1.0) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999) at a constant rate, after global-norm clipping."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(learning_rate, weight_decay=0.01))


def init_generator_state(generator: Generator, tx: optax.GradientTransformation) -> GeneratorState:
    """Step 0: fresh moments for the generator's weights; its embeddings have none."""
    return GeneratorState(step=jnp.int32(0), generator=generator, opt_state=tx.init(generator.weights))


def _generator_step(
    state: GeneratorState,
    params: Mapping[str, Any],
    adapters: Adapters,
    batch: Batch,
    key: Array,
    ratio: float,
    spec: ModelSpec,
    space: Space,
    tx: optax.GradientTransformation,
    options: StepOptions,
) -> tuple[GeneratorState, dict[str, Array]]:
    """One update of the generator: the model and its adapters run under soft masks, without dropout.

    Args:
        state: the generator's state; its buffers are consumed.
        params: the base.
        adapters: the current adapters.
        batch: rows that the adapters do not learn from, see `efx_jax.training.step`.
        key: the run's PRNG key of the noise; the step number is folded in.
        ratio: share of the weights of the seven linears to remove.
        spec: the model.
        space: which units.
        tx: the generator's optimizer.
        options: dtype, remat and attention of the forward pass, and `micro_batches`; the dropout is ignored.

    Returns:
        The new state and float32 scalars: `loss`, its parts `nll` (nats per loss-carrying token) and `kept` (p, the
        kept fraction under this draw's hard masks), `grad_norm` before clipping, and `norm` of the weights after the
        update.
    """
    noise_key = jax.random.fold_in(key, state.step)
    options = dataclasses.replace(options, dropout_rate=0.0)

    def draw(weights: Weights) -> dict[str, Array]:
        return draw_soft(dataclasses.replace(state.generator, weights=weights), noise_key)

    def summed_nll(weights: Weights, part: Batch) -> tuple[Array, Array]:
        masked, masked_adapters = soften(params, adapters, draw(weights), spec, space)
        return model_loss(masked, masked_adapters, None, part, noise_key, spec, options)

    def deviation(weights: Weights) -> tuple[Array, Array]:
        hard = {kind: straight_through(mask) for kind, mask in draw(weights).items()}
        kept = kept_fraction(hard, spec, space)
        return generator_loss(jnp.float32(0), kept, ratio), kept

    weights = state.generator.weights
    summed_grads, summed, _ = accumulate_gradient(summed_nll, weights, batch, options.micro_batches)
    (far, kept), far_grads = jax.value_and_grad(deviation, has_aux=True)(weights)
    count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    grads = jax.tree.map(lambda data, ratio_term: data / count + ratio_term, summed_grads, far_grads)
    updates, opt_state = tx.update(grads, state.opt_state, weights)
    weights = optax.apply_updates(weights, updates)
    generator = dataclasses.replace(state.generator, weights=weights)
    nll = summed / count
    norms = {"grad_norm": optax.tree.norm(grads), "norm": optax.tree.norm(weights)}
    metrics = {"loss": nll + far, "nll": nll, "kept": kept, **norms}
    return constrain_tree((GeneratorState(state.step + 1, generator, opt_state), metrics))


def _adapter_step(
    state: TrainState,
    params: Mapping[str, Any],
    unit_masks: Mapping[str, Array],
    batch: Batch,
    key: Array,
    total_steps: int,
    spec: ModelSpec,
    space: Space,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    options: StepOptions,
) -> tuple[TrainState, dict[str, Array]]:
    """One update of the adapters under unit masks, then the group lasso's proximal step on what is pruned.

    The forward pass is ATP's: masked frozen weights and unmasked adapters, y = x (mask * W)^T + scale (x A^T) B^T.

    Args:
        state: adapters and moments; its buffers are consumed.
        params: the frozen base.
        unit_masks: kind -> bool `[L,n]`, in force in this step.
        batch: see `efx_jax.training.step`.
        key: the run's PRNG key of dropout.
        total_steps: updates of the whole run, for `lasso_strength`.
        spec: the model.
        space: whose kinds the masks are.
        tx: the adapters' optimizer.
        learning_rate: its schedule, for the size of the proximal step.
        options: see `StepOptions`; its `mask_forward` is ignored.

    Returns:
        The new state and the metrics of `train_step`.
    """
    new, metrics = train_step(
        state,
        without_pruned_biases(params, unit_masks, spec, space),
        weight_masks(unit_masks, spec, space),
        batch,
        key,
        spec,
        tx,
        dataclasses.replace(options, mask_forward="frozen"),
    )
    strength = lasso_strength(state.step, total_steps)
    adapters = proximal_step(new.adapters, unit_masks, spec, space, strength, learning_rate(state.step))
    return constrain_tree((dataclasses.replace(new, adapters=adapters), metrics))


generator_step = jax.jit(_generator_step, static_argnames=("spec", "space", "tx", "options"), donate_argnames="state")
adapter_step = jax.jit(
    _adapter_step, static_argnames=("spec", "space", "tx", "learning_rate", "options"), donate_argnames="state"
)
