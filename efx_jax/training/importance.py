"""What some scores read at an event: the importance of weights (training batches) or outputs (calibration rows)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax

from efx_jax.config import Config
from efx_jax.config_event import reads_importance, surveyed_rows
from efx_jax.lora import Adapters
from efx_jax.model.attention import Implementation
from efx_jax.parallel.mesh import make_mesh
from efx_jax.parallel.partition import constrain_tree
from efx_jax.pruning.general import general_importance
from efx_jax.pruning.lora_gradient import lora_gradient_importance
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.statistics import Statistics
from efx_jax.training.feed import epoch_rows, mesh_batch, rows_per_pass
from efx_jax.training.gradients import (
    OptionsOf,
    Tree,
    as_it_stands,
    domain_importance,
    mean_adapter_gradient,
)
from efx_jax.training.prepare import Prepared, calibration
from efx_jax.training.schedule import Event, learning_rate, total_steps
from efx_jax.training.state import RunState
from efx_jax.training.step import Batch, StepOptions, step_options

Array = jax.Array
# D-Pruner's domain pass (arXiv 2405.06275 and its scripts).
_DOMAIN_EPOCHS = 5.0
_DOMAIN_WARMUP = 0.1
# Key of the stream of drawn tokens, separate from those that the loop splits off the seed.
_DRAWN = 0xF15E


def run_importance(
    config: Config, prepared: Prepared, state: RunState, event: Event, attention_path: Implementation
) -> tuple[dict[str, Array] | None, Statistics | None]:
    """The importance that the run's score reads at an event, see `prune_event`, and statistics that come with it.

    `foresight_loss` uses a `survey_share` of the calibration rows. The other scores use the batches that training would
    use next, a pure function of the seed and the event's step.

    Returns:
        The importance, None for scores that read none; and the statistics of the whole model, without Grams, on the
        rows that `foresight_loss` has read, None for other scores.
    """
    if not reads_importance(config.prune):
        return None, None
    if config.prune.score == "foresight_loss":
        return _run_output_gradients(config, prepared, state, event, attention_path)
    mesh, rows = make_mesh(config.mesh), prepared.train

    def batches(count: int) -> Iterator[Batch]:
        return (mesh_batch(config, rows, event.step + number, mesh) for number in range(count))

    def options_of(batch: Batch) -> StepOptions:
        options = step_options(config, rows_per_pass(config, batch["tokens"].shape[1]), attention_path)
        return dataclasses.replace(options, dropout_rate=0.0)

    if config.prune.score == "dpruner":
        return _run_domain_pass(config, prepared, state, batches, options_of, attention_path), None
    adapters, masks, spec = state.train.adapters, state.masks or None, prepared.spec
    taken = batches(config.prune.gradient_batches)
    gradients = mean_adapter_gradient(state.params, adapters, masks, taken, spec, options_of)
    return _score_adapters(state.params["layers"], adapters, gradients, config.prune.targets), None


def _run_output_gradients(
    config: Config, prepared: Prepared, state: RunState, event: Event, attention_path: Implementation
) -> tuple[dict[str, Array], Statistics]:
    """Energies `[L,O]` of the gradients with respect to the linears' outputs, in the model before the event.

    Also the statistics of the rows.
    """
    drawn = config.prune.gradient_labels == "model"
    return output_gradient_energy(
        state.params,
        calibration(config, prepared, surveyed_rows(config.prune)),
        prepared.spec,
        state.train.adapters,
        state.masks or None,
        config.prune.targets,
        mask_forward=config.prune.mask_forward,
        compute_dtype=config.model.compute_dtype,
        remat=config.train.remat,
        attention_path=attention_path,
        key=jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _DRAWN), event.step) if drawn else None,
    )


@functools.partial(jax.jit, static_argnames="names")
def _score_adapters(
    layers: Mapping[str, Array], adapters: Adapters, gradients: Tree, names: tuple[str, ...]
) -> dict[str, Array]:
    return constrain_tree(lora_gradient_importance(layers, adapters, gradients, names))


def _run_domain_pass(
    config: Config,
    prepared: Prepared,
    state: RunState,
    batches: Callable[[int], Iterator[Batch]],
    options_of: OptionsOf,
    attention_path: Implementation,
) -> dict[str, Array]:
    """D-Pruner on the current model, with the calibration rows as general text."""
    prune, spec = config.prune, prepared.spec
    weights, rest = as_it_stands(state.params, state.train.adapters, state.masks or None, prune.mask_forward)
    general = None
    if prune.general_weight:
        general = general_importance(
            {**rest, "layers": rest["layers"] | weights},
            calibration(config, prepared),
            spec,
            prune.targets,
            compute_dtype=config.model.compute_dtype,
            attention_path=attention_path,
        )
    passes = dataclasses.replace(
        config.train,
        epochs=_DOMAIN_EPOCHS,
        steps=prune.domain_steps,
        learning_rate=prune.domain_learning_rate,
        schedule="linear",
        warmup=_DOMAIN_WARMUP,
    )
    steps = total_steps(passes, epoch_rows(config, prepared.train))
    rate = learning_rate(passes, steps)
    return domain_importance(
        weights,
        rest,
        general,
        batches(steps),
        (float(rate(number)) for number in range(steps)),
        spec,
        options_of,
        prune.targets,
        prune.general_weight,
        prune.domain_loss_scale,
    )
