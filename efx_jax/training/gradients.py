"""Gradients that scores read: of the adapters over some batches, and of all linears during D-Pruner's domain pass."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efx_jax.config import GRADIENT_SCORES, Config, MaskForward
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, merge
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.parallel.partition import constrain_tree
from efx_jax.pruning.dpruner import clip_factor, regularised_gradient, three_term_importance
from efx_jax.pruning.statistics import add_up, real_tokens
from efx_jax.training.state import trainable
from efx_jax.training.step import Batch, StepOptions, accumulate_gradient, model_loss, summed_loss

Array = jax.Array
Tree = dict[str, Any]
OptionsOf = Callable[[Batch], StepOptions]
_CLIP = 1.0  # of D-Pruner's pass (arXiv 2405.06275 and its scripts)


def mean_adapter_gradient(
    params: Mapping[str, Any],
    adapters: Adapters,
    masks: Mapping[str, Array] | None,
    batches: Iterable[Batch],
    spec: ModelSpec,
    options_of: OptionsOf,
) -> Tree:
    """Adapter gradient of the mean loss over all loss-carrying tokens of some batches, under the masks.

    Args:
        params: the base.
        adapters: the adapters.
        masks: masks in force, or None.
        batches: training batches, see `efx_jax.training.step`.
        spec: the model.
        options_of: how a batch is computed; the dropout must be 0.

    Returns:
        `lora_a` and `lora_b`, name -> float32 like the adapters.
    """
    gradients, tokens = add_up(
        _adapter_gradient(adapters, params, masks, batch, spec, options_of(batch)) for batch in batches
    )
    return jax.tree.map(lambda leaf: leaf / jnp.maximum(tokens, 1.0), gradients)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _adapter_gradient(
    adapters: Adapters,
    params: Mapping[str, Any],
    masks: Mapping[str, Array] | None,
    batch: Batch,
    spec: ModelSpec,
    options: StepOptions,
) -> tuple[Tree, Array]:
    """The summed gradient of one batch and its number of loss-carrying tokens."""

    def loss(arrays: Tree, part: Batch) -> tuple[Array, dict[str, Array]]:
        return summed_loss(arrays, adapters, params, masks, part, jax.random.key(0), spec, options)

    grads, _, _ = accumulate_gradient(loss, trainable(adapters), batch, options.micro_batches)
    return constrain_tree(grads), jnp.sum(batch["weights"])


def domain_importance(
    weights: dict[str, Array],
    rest: Mapping[str, Any],
    general: Mapping[str, Array] | None,
    batches: Iterable[Batch],
    learning_rates: Iterable[float],
    spec: ModelSpec,
    options_of: OptionsOf,
    names: Iterable[str] = LINEARS,
    general_weight: float = 0.1,
    loss_scale: float = 2.0**16,
) -> dict[str, Array]:
    """D-Pruner's importance: the terms of `three_term_importance` summed over a pass of plain SGD.

    The weights are updated in their own dtype: in bfloat16 most updates are below half a unit in the last place and are
    rounded away.

    Args:
        weights: the linears to update, name -> `[L,O,I]`; consumed.
        rest: the parameter tree without them.
        general: general importance, name -> float32 `[L,O,I]`; None: no regulariser.
        batches: training batches; all their real tokens carry loss here.
        learning_rates: of each step, as many as there are batches.
        spec: the model.
        options_of: how a batch is computed.
        names: linears whose importance is wanted.
        general_weight: lambda.
        loss_scale: what the loss is multiplied by for regulariser and importance; the updates are not scaled.

    Returns:
        name -> float32 `[L,O,I]`.

    Raises:
        InputError: the pass has diverged.
    """
    importance = {name: jnp.zeros_like(weights[name], jnp.float32) for name in names}
    losses = []
    for batch, rate in zip(batches, learning_rates, strict=True):
        weights, importance, loss = domain_step(
            weights, importance, rest, general, batch, rate, spec, options_of(batch), general_weight, loss_scale
        )
        losses.append(loss)
    if not np.all(np.isfinite(jax.device_get(losses))):
        raise InputError("prune.score dpruner: the domain pass has diverged; lower prune.domain_learning_rate")
    return importance


@functools.partial(jax.jit, static_argnames=("spec", "options"), donate_argnames=("weights", "importance"))
def domain_step(
    weights: dict[str, Array],
    importance: dict[str, Array],
    rest: Mapping[str, Any],
    general: Mapping[str, Array] | None,
    batch: Batch,
    learning_rate: Array | float,
    spec: ModelSpec,
    options: StepOptions,
    general_weight: Array | float,
    loss_scale: Array | float,
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """One step of D-Pruner's domain pass: regularise, add to the importance, clip, update.

    Args:
        weights: the linears, name -> `[L,O,I]`; consumed.
        importance: the sums so far, name -> float32 `[L,O,I]`; consumed.
        rest: the parameter tree without the linears.
        general: as in `domain_importance`.
        batch: as in `domain_importance`.
        learning_rate: of this step.
        spec: the model.
        options: how the batch is computed.
        general_weight: lambda.
        loss_scale: as in `domain_importance`.

    Returns:
        (weights, importance, mean loss before the step).
    """
    batch = {**batch, "weights": real_tokens(batch["tokens"], batch["lengths"])}

    def loss(weights: dict[str, Array], part: Batch) -> tuple[Array, Array]:
        params = {**rest, "layers": rest["layers"] | weights}
        return model_loss(params, None, None, part, jax.random.key(0), spec, options)

    grads, nll, _ = accumulate_gradient(loss, weights, batch, options.micro_batches)
    count = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    grads = {name: grad * (loss_scale / count) for name, grad in grads.items()}
    if general is not None:
        grads |= {
            name: regularised_gradient(grads[name], general[name], learning_rate, general_weight) for name in general
        }
    importance = {name: total + three_term_importance(weights[name], grads[name]) for name, total in importance.items()}
    grads = {name: grad / loss_scale for name, grad in grads.items()}
    move = learning_rate * clip_factor(optax.tree.norm(grads), _CLIP)
    weights = {name: (weight - move * grads[name]).astype(weight.dtype) for name, weight in weights.items()}
    return *constrain_tree((weights, importance)), nll / count


def as_it_stands(
    params: Mapping[str, Any], adapters: Adapters | None, masks: Mapping[str, Array] | None, mask_forward: MaskForward
) -> tuple[dict[str, Array], Tree]:
    """The model before an event, with adapters and masks merged in and its linears in arrays of their own.

    Returns:
        (linears, the parameter tree without them), matching the forward pass: "dense" ignores the masks, "frozen" does
        not apply them to the adapters.
    """
    if mask_forward == "frozen":
        params, masks = merge(params, None, masks), None
    merged = merge(params, adapters, None if mask_forward == "dense" else masks)["layers"]
    weights = {
        name: jnp.copy(merged[name]) if merged[name] is params["layers"][name] else merged[name] for name in LINEARS
    }
    return weights, {**params, "layers": {name: leaf for name, leaf in merged.items() if name not in LINEARS}}


def importance_bytes(config: Config, entries: Mapping[str, int], width: int) -> int:
    """Bytes that computing and holding the importance takes on a device, without activations.

    For D-Pruner it includes the general importance, the updated weights, their gradient and its sum.

    Args:
        config: score, targets and the weight of the general importance.
        entries: number of entries of each linear over all blocks, on this device.
        width: bytes of a stored weight.
    """
    prune = config.prune
    if prune.score not in GRADIENT_SCORES:
        return 0
    pruned = 4 * sum(entries[name] for name in prune.targets)
    if prune.score == "lora_gradient":
        return pruned
    return pruned * (2 if prune.general_weight else 1) + (2 * width + 4) * sum(entries.values())
