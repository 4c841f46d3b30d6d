"""The plan of a prune event, made before any work: its settings and inputs checked, and what every matrix drops."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.config import GRADIENT_SCORES, PruneConfig
from efx_jax.config_event import keeps_scores, matrix_group, reads_importance
from efx_jax.config_prune import validate_prune
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.masks import pack_mask
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer, stack_layers
from efx_jax.parallel.partition import constrain_tree
from efx_jax.pruning.average import PruneState, init_prune_state, prunable
from efx_jax.pruning.budget import event_budgets
from efx_jax.pruning.selection import Counts, selection_counts
from efx_jax.pruning.sparsegpt import slab_counts
from efx_jax.pruning.statistics import Statistics
from efx_jax.shapes import require_shape

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class EventPlan:
    """An event's checked inputs: the stacked model, the state to start from, and what every layer drops, by matrix.

    `importance` is that of the pruned linears, stacked, if the score reads it; {} otherwise.
    """

    stacked: Layer
    importance: dict[str, Array]
    state: PruneState
    counts: tuple[dict[str, Counts], ...]
    keys: Array
    spec: ModelSpec
    config: PruneConfig
    scale: float


def plan_event(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
    stats: Statistics | None = None,
    importance: Mapping[str, Array] | None = None,
) -> EventPlan:
    """Checks an event before any work.

    Args:
        stats: statistics of the whole model, where `config.budget` needs them.

    The other arguments and the errors are those of `efx_jax.pruning.event.prune_event`.
    """
    state = _check_event(params, adapters, state, config)
    names = prunable(params["layers"], config)
    importance = _read_importance(importance or {}, params["layers"], names, config)
    budgets = event_budgets(params, adapters, stats, importance, spec, config)
    stacked = stack_layers(params, adapters, masks)
    return EventPlan(
        stacked=dataclasses.replace(stacked, masks=_packed(stacked.masks)),
        importance=importance,
        state=state,
        counts=tuple(_event_counts(params["layers"], config, budget) for budget in budgets),
        keys=jax.random.split(jax.random.fold_in(state.key, state.event), spec.num_layers),
        spec=spec,
        config=config,
        scale=1.0 if adapters is None else adapters.scale,
    )


def _check_event(
    params: Mapping[str, Any], adapters: Adapters | None, state: PruneState | None, config: PruneConfig
) -> PruneState:
    """The state to start from, an empty one where there is none yet.

    Raises:
        InputError: as `prune_event`.
    """
    validate_prune(config)
    if config.permute:
        raise InputError(
            "prune.permute: an event leaves units where they are, expected False; call find_order and permute of "
            "efx_jax.pruning.permutation before it, and collect statistics after them"
        )
    if config.recovery in ("pbs", "gram_pbs") and not (adapters and adapters.lora_a.keys() & set(config.targets)):
        raise InputError(
            f"prune.recovery {config.recovery} moves adapters, found none of prune.targets; pass adapters, or take admm"
        )
    if state is None:
        return init_prune_state(params, adapters, config, jax.random.key(0))
    marked = _remembered(state, "reach")
    held = state.score.keys() if keeps_scores(config) else marked
    if config.ema < 1 and not held >= set(prunable(params["layers"], config)):
        raise InputError(
            f"prune.ema {config.ema}: the state has no memory of these matrices; make it by init_prune_state with "
            "these settings"
        )
    before, now = _remembered(state, "lora_a"), set() if adapters is None else marked & adapters.lora_a.keys()
    if before != now:
        then, found = (", ".join(sorted(names)) or "no matrix" for names in (before, now))
        raise InputError(
            f"adapters: the state remembers those of {then}, found {found}; make it by init_prune_state with these "
            "adapters"
        )
    return state


def _remembered(state: PruneState, kind: str) -> set[str]:
    """The matrices for which a state holds snapshots of a given kind."""
    return {name.removeprefix(f"{kind}/") for name in state.snapshots if name.startswith(f"{kind}/")}


def _read_importance(
    importance: Mapping[str, Array], layers: Mapping[str, Array], names: tuple[str, ...], config: PruneConfig
) -> dict[str, Array]:
    """The part of the importance that the score reads."""
    if not reads_importance(config):
        return {}
    by_entry = config.score in GRADIENT_SCORES
    shapes = {name: layers[name].shape if by_entry else layers[name].shape[:2] for name in names}
    missing = [name for name in names if name not in importance]
    if missing:
        source = "efx_jax.training.importance" if by_entry else "output_gradient_energy(...)[0]"
        raise InputError(
            f"prune.score {config.score} reads gradients: expected an importance {'[L,O,I]' if by_entry else '[L,O]'} "
            f"for each of prune.targets, found none for {', '.join(missing)}; pass `importance` to prune_event, from "
            f"{source}"
        )
    for name in names:
        require_shape(f"importance of {name}", importance[name], shapes[name])
    return {name: importance[name] for name in names}


def _event_counts(layers: Mapping[str, Array], config: PruneConfig, budget: Mapping[str, float]) -> dict[str, Counts]:
    """Exact counts of a layer's matrices from their sparsities, on the host: a new sparsity needs no new program."""

    def counts(name: str, sparsity: float) -> Counts:
        shape, group = layers[name].shape, matrix_group(name, config)
        if config.score == "sparsegpt":
            return slab_counts(shape, sparsity, group)
        return selection_counts(shape, sparsity, group, config.bound)

    return {name: counts(name, sparsity) for name, sparsity in budget.items()}


@jax.jit
def _packed(masks: Mapping[str, Array]) -> dict[str, Array]:
    return constrain_tree({name: pack_mask(mask) if mask.dtype == jnp.bool_ else mask for name, mask in masks.items()})
