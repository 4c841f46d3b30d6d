"""A run's prune event replayed on the model before it: its scores around the threshold, and what recovery repairs.

A run keeps the result of an event, not its inputs. Its criterion, group, sparsity and recovery are all settings, so the
same functions on the same model, with rows of the same data, repeat what the event did. If there are several events,
the first is replayed, on the model before it, with its recovery and the run's full sparsity, without earlier masks.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.analysis.blocks import BlockView, Model, walk
from efx_jax.analysis.where import FAR
from efx_jax.config import GRADIENT_SCORES, PruneConfig
from efx_jax.config_event import matrix_group, needs_gram, reads_importance, without_recovery
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, effective_weight
from efx_jax.masks import unpack_mask
from efx_jax.pruning.average import prunable
from efx_jax.pruning.block import block_scores
from efx_jax.pruning.budget import budget_statistics
from efx_jax.pruning.event import block_before, block_importance, prune_one
from efx_jax.pruning.event_plan import EventPlan, plan_event
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.selection import drop_by_counts
from efx_jax.pruning.statistics import INPUT_OF, Statistics, block_statistics

Array = jax.Array
_GRADIENT_ROWS = 4  # sequences whose logits are in memory at once
EDGES = tuple(float(edge) for edge in np.linspace(-3, 2, 51))
"""Edges of `ScoreSpread`'s bins, as powers of ten."""


@dataclasses.dataclass(frozen=True)
class Repair:
    """One matrix after the event, on rows that the event has not seen.

    `error_masked`, `error_recovered`: norm of the change of its output, relative to that of the output, with the mask
    alone and with the recovery. `moved`: share of the kept entries that the recovery changes by more than a tenth of
    their value. `move_norm`: norm of the change of the kept entries, relative to their norm.
    """

    layer: int
    matrix: str
    error_masked: float
    error_recovered: float
    moved: float
    move_norm: float


@dataclasses.dataclass(frozen=True)
class ScoreSpread:
    """The scores of one matrix, counted in the bins of `EDGES`: log10 of score over threshold.

    `threshold`: the score below which lie as many entries of the whole matrix as the event prunes; the end bins include
    everything beyond them, also scores of 0. `kept`, `pruned`: counts of entries, as the group decides, `[50]`.
    `across`: share of all entries that a comparison over the whole matrix would decide the other way: some are pruned
    above the threshold, and as many kept below it.
    """

    layer: int
    matrix: str
    threshold: float
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    across: float


def event_settings(config: PruneConfig) -> PruneConfig:
    """The settings of a single event at the run's full sparsity.

    Raises:
        InputError: a dense run, or a criterion that cannot be replayed on a few rows.
    """
    if config.sparsity == 0:
        raise InputError("prune.sparsity 0: a dense run has no prune event to look at; choose a pruned one")
    if config.score in (*GRADIENT_SCORES, "atp"):
        raise InputError(
            f"prune.score {config.score}: cannot be replayed, as it reads gradients of training; expected magnitude, "
            "wanda, ria, sparsegpt or one of foresight"
        )
    return dataclasses.replace(config, ema=1.0, merge_each_event=False, sequential=False, dense_path=0.0)


def replay_recovery(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    seen: Model,
    unseen: Model,
    layers: Sequence[int],
    config: PruneConfig,
) -> Iterator[Repair]:
    """Prunes some layers as the run's event does, calibrated on `seen`, and measures their outputs on `unseen`.

    Args:
        params: parameter tree before the event.
        adapters: adapters before the event; `pbs` and `gram_pbs` change them.
        seen: this model on calibration rows (`blocks.look_at`).
        unseen: this model on other rows.
        layers: numbers of the layers.
        config: the run's settings.

    Raises:
        InputError: as in `event_settings`, or any error of the event itself.
    """
    config = event_settings(config)
    plan = _plan(params, adapters, seen, config)
    for (layer, view), (_, other) in zip(walk(seen, layers), walk(unseen, layers), strict=True):
        before, memory = block_before(plan, layer)
        stats = block_statistics(view.taps, view.real, gram=needs_gram(config))
        after, _ = prune_one(plan, layer, before, stats, memory)
        for matrix in plan.counts[layer]:
            whole = view.weights[matrix]
            mask = unpack_mask(after.masks[matrix], whole.shape[-1])
            repaired = effective_weight(
                after.weights.get(matrix, before.weights[matrix]),
                after.lora_a.get(matrix),
                after.lora_b.get(matrix),
                plan.scale,
            )
            yield Repair(layer, matrix, *map(float, _repair(other, matrix, whole, mask, repaired)))


def score_spreads(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    model: Model,
    layers: Sequence[int],
    config: PruneConfig,
) -> Iterator[ScoreSpread]:
    """The scores of every pruned matrix of some layers, and which of them the event's group keeps.

    Args:
        params: parameter tree before the event.
        adapters: adapters before the event, or None.
        model: this model on calibration rows.
        layers: numbers of the layers.
        config: the run's settings.

    Raises:
        InputError: as in `event_settings`; SparseGPT, which scores columns one by one while it updates them.
    """
    config = event_settings(config)
    if config.score == "sparsegpt":
        raise InputError("prune.score sparsegpt: has no scores of a matrix as it stands, it moves the weights between")
    # The recovery does not affect the scores, and some recoveries need adapters.
    plan = _plan(params, adapters, model, without_recovery(config))
    for layer, view in walk(model, layers):
        before, _ = block_before(plan, layer)
        importance = block_importance(plan, layer)
        scores, _ = block_scores(before, view.weights, view.stats, importance, model.spec, config)
        for matrix, score in scores.items():
            dropped = drop_by_counts(score, matrix_group(matrix, config), plan.counts[layer][matrix])
            yield _spread(layer, matrix, np.asarray(score, np.float64), np.asarray(dropped))


def _plan(params: Mapping[str, Any], adapters: Adapters | None, model: Model, config: PruneConfig) -> EventPlan:
    lengths = jnp.sum(model.real, axis=1).astype(jnp.int32)
    importance: dict[str, Array] = {}
    stats: Statistics | None
    if reads_importance(config):
        rows = [
            {"tokens": model.tokens[first : first + _GRADIENT_ROWS], "lengths": lengths[first : first + _GRADIENT_ROWS]}
            for first in range(0, len(model.tokens), _GRADIENT_ROWS)
        ]
        names = prunable(params["layers"], config)
        with jax.default_matmul_precision("highest"):
            importance, stats = output_gradient_energy(
                params,
                rows,
                model.spec,
                adapters,
                names=names,
                compute_dtype="float32",
                key=jax.random.key(0) if config.gradient_labels == "model" else None,
            )
    else:
        batches = [{"tokens": model.tokens, "lengths": lengths}]
        stats = budget_statistics(params, adapters, None, batches, model.spec, config, "float32")
    return plan_event(params, adapters, None, None, model.spec, config, stats, importance)


@jax.jit
def _norms(x: Array, real: Array, *weights: Array) -> list[Array]:
    """Norm, over real tokens, of the output of each weight `[O,I]` on x `[B,T,I]`."""
    x = x * real[..., None]
    return [jnp.linalg.norm(jnp.einsum("bti,oi->bto", x, weight, precision="highest")) for weight in weights]


def _repair(view: BlockView, matrix: str, whole: Array, mask: Array, repaired: Array) -> tuple[Array, ...]:
    kept, repaired = jnp.where(mask, whole, 0.0), jnp.where(mask, repaired, 0.0)
    output, masked, recovered = _norms(view.taps[INPUT_OF[matrix]], view.real, whole, kept - whole, repaired - whole)
    move = repaired - kept
    moved = jnp.sum(jnp.abs(move) > FAR * jnp.abs(kept)) / jnp.sum(mask)
    return masked / output, recovered / output, moved, jnp.linalg.norm(move) / jnp.linalg.norm(kept)


def _spread(layer: int, matrix: str, score: np.ndarray, dropped: np.ndarray) -> ScoreSpread:
    count = int(dropped.sum())
    threshold = float(np.partition(score, count, axis=None)[count])
    # If the threshold is 0, every other score is infinitely far above it.
    with np.errstate(divide="ignore"):
        ratios = np.log10(score / threshold) if threshold else np.where(score > 0, np.inf, -np.inf)
    places = np.clip(ratios, EDGES[0], np.nextafter(EDGES[-1], 0))
    kept, pruned = (np.histogram(places[chosen], EDGES)[0] for chosen in (~dropped, dropped))
    # Both ways prune equally many, and ties at the threshold may go either way: the larger count has its counterpart.
    other_way = 2 * max(np.sum(dropped & (score > threshold)), np.sum(~dropped & (score < threshold)))
    across = float(other_way / score.size)
    return ScoreSpread(layer, matrix, threshold, tuple(map(int, kept)), tuple(map(int, pruned)), across)
