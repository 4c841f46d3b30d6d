"""The prune event of one block: score -> moving average -> mask -> swaps -> recovery -> merge."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efx_jax.config import GRADIENT_SCORES, PruneConfig
from efx_jax.config_event import matrix_group, moves_base
from efx_jax.lora import effective_weight, init_lora_matrices, merge_linears
from efx_jax.masks import pack_mask
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.model.stack import Layer
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import constrain_tree, linear_axes, split_rows
from efx_jax.pruning.average import Memory, moving_average, prunable
from efx_jax.pruning.block_recovery import inverses, recover_block, recovery_targets
from efx_jax.pruning.scores import activation_reach, loss_reach, matrix_score, weight_reach
from efx_jax.pruning.selection import Counts, drop_by_counts, parse_pattern
from efx_jax.pruning.sparsegpt import Sweep, sparsegpt_on_mesh
from efx_jax.pruning.statistics import INPUT_OF, Statistics
from efx_jax.pruning.swaps import swap_mask

Array = jax.Array


def effective_weights(layer: Layer, scale: float) -> dict[str, Array]:
    """U `[O,I]` of every linear of one block, float32: name -> W + scale * B A."""
    return {
        name: effective_weight(layer.weights[name], layer.lora_a.get(name), layer.lora_b.get(name), scale)
        for name in LINEARS
    }


def block_scores(
    layer: Layer,
    effective: Mapping[str, Array],
    stats: Statistics,
    importance: Mapping[str, Array],
    spec: ModelSpec,
    config: PruneConfig,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Scores `[O,I]` and downstream reach nu `[O]` of the pruned matrices of one block."""
    names = prunable(layer.weights, config)
    if config.score == "foresight":
        reach = weight_reach(effective, spec)
    elif config.score == "foresight_gated":
        reach = activation_reach(effective, layer.weights, stats, spec)
    elif config.score == "foresight_loss" and importance:
        reach = {name: loss_reach(importance[name], config.reach_shrink) for name in names}
    else:
        reach = {name: jnp.ones(effective[name].shape[0], jnp.float32) for name in names}
    if config.score in GRADIENT_SCORES:
        return {name: importance[name] for name in names}, reach
    return {name: matrix_score(effective[name], stats.input_norm(name), reach[name], config) for name in names}, reach


def prune_block(
    layer: Layer,
    stats: Statistics,
    importance: Mapping[str, Array],
    memory: Memory,
    counts: dict[str, Counts],
    key: Array,
    event: Array,
    spec: ModelSpec,
    config: PruneConfig,
    scale: float,
) -> tuple[Layer, Memory]:
    """The event for one block: score, moving average, selection, swaps, recovery, merge.

    Args:
        layer: the block's arrays, without L.
        stats: its statistics.
        importance: its importance `[O,I]` from gradients (`[O]` for "foresight_loss"), for the scores that read it; {}
            for the others.
        memory: its part of the moving average, see `PruneState`.
        counts: entries to drop, by matrix.
        key: PRNG key for redrawn adapters.
        event: number of earlier events.
        spec: the model.
        config: the settings (its sparsity is not read).
        scale: alpha / R.

    Returns:
        The block (only those weights that the event has changed; masks packed) and its part of the moving average.
    """
    effective = effective_weights(layer, scale)
    targets = recovery_targets(layer, effective, counts, stats, config)
    swept: dict[str, Sweep] = {}
    if config.score == "sparsegpt":
        with jax.named_scope("sparsegpt"):
            swept = _sweep_block(targets if config.recovery == "obs" else effective, counts, stats, config)
        masks = {name: sweep.mask for name, sweep in swept.items()}
    else:
        with jax.named_scope("foresight"):
            scores, reach = block_scores(layer, effective, stats, importance, spec, config)
        if config.ema < 1:
            scores, memory = moving_average(scores, reach, layer, stats, memory, event, config, scale)
        with jax.named_scope("select"):
            masks = _select(scores, counts, config)
    if config.swaps:
        with jax.named_scope("swap"):
            masks = _swap(effective, masks, stats, config)
    with jax.named_scope("recover"):
        layer, masks = recover_block(layer, effective, targets, masks, swept, stats, config, scale)
    layer = dataclasses.replace(layer, masks=layer.masks | {name: pack_mask(mask) for name, mask in masks.items()})
    if config.merge_each_event:
        layer = _merge_and_redraw(layer, key, scale)
    moved = {name: layer.weights[name] for name in LINEARS} if moves_base(config) else {}
    return constrain_tree((dataclasses.replace(layer, weights=moved), memory))


def _select(scores: dict[str, Array], counts: dict[str, Counts], config: PruneConfig) -> dict[str, Array]:
    """Masks `[O,I]` of the highest scores."""
    mesh = active_mesh()
    return {
        name: ~drop_by_counts(
            score, matrix_group(name, config), counts[name], None if mesh is None else linear_axes(name)
        )
        for name, score in scores.items()
    }


def _swap(
    effective: dict[str, Array], masks: dict[str, Array], stats: Statistics, config: PruneConfig
) -> dict[str, Array]:
    """Masks that lose less of U and keep as many entries in every row.

    U is compared, not the targets of the recovery: those hold only what the old mask kept; swaps would lead back to it.
    """
    swap = functools.partial(swap_mask, swaps=config.swaps, pattern=parse_pattern(config.group))
    return {
        name: split_rows(swap, name, (effective[name], mask), (stats.input_gram(name),)) for name, mask in masks.items()
    }


def _sweep_block(
    weights: dict[str, Array], counts: dict[str, Counts], stats: Statistics, config: PruneConfig
) -> dict[str, Sweep]:
    """SparseGPT's masks and weights. If the event keeps its weights, `weights` are the targets of the event.

    If it takes only the masks, `weights` are U, as for every other score: entries that an old mask has dropped may
    come back.
    """
    factors = inverses(counts, stats)
    return {
        name: sparsegpt_on_mesh(name, weights[name], factors[INPUT_OF[name]], counts[name], matrix_group(name, config))
        for name in counts
    }


def _merge_and_redraw(layer: Layer, key: Array, scale: float) -> Layer:
    """W = mask * U and fresh adapters, as the authors' code does at each event."""
    weights = merge_linears(layer.weights, layer.lora_a, layer.lora_b, layer.masks, scale)
    if not layer.lora_a:
        return dataclasses.replace(layer, weights=weights)
    rank = next(iter(layer.lora_a.values())).shape[0]
    shapes = {name: (1, weights[name].shape[0], weights[name].shape[1]) for name in layer.lora_a}
    lora_a, lora_b = init_lora_matrices(key, shapes, rank)
    return dataclasses.replace(
        layer,
        weights=weights,
        lora_a={name: a[0] for name, a in lora_a.items()},
        lora_b={name: b[0] for name, b in lora_b.items()},
    )
