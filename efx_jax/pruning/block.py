"""The prune event of one block: score -> moving average -> mask -> recovery -> merge."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from efx_jax.config import GRADIENT_SCORES, PruneConfig
from efx_jax.lora import effective_weight, init_lora_matrices, merge_linears
from efx_jax.masks import pack_mask, unpack_mask
from efx_jax.model.decoder import Layer
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.parallel.mesh import active_mesh
from efx_jax.parallel.partition import constrain_tree, linear_axes, split_rows
from efx_jax.pruning.average import Memory, moves_base, moving_average, prunable, refits_base
from efx_jax.pruning.recovery import admm_refit, gram_brain_surgeon, partial_brain_surgeon
from efx_jax.pruning.scores import activation_reach, matrix_score, weight_reach
from efx_jax.pruning.selection import Counts, drop_by_counts, parse_pattern
from efx_jax.pruning.sparsegpt import Inverse, Sweep, inverse_factor, obs_by_factor, sparsegpt_on_mesh
from efx_jax.pruning.statistics import INPUT_OF, INPUTS, Statistics

Array = jax.Array
_GRAM_RIDGE = 1e-3


def matrix_group(name: str, config: PruneConfig) -> str:
    """The comparison group of one matrix."""
    return "row" if name in config.row_targets and config.group in ("matrix", "slab", "bounded") else config.group


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
    elif config.score == "foresight_loss":
        reach = {name: jnp.sqrt(importance[name]) for name in names}
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
    """The event for one block: score, moving average, selection, recovery, merge.

    Args:
        layer: the block's arrays, without L.
        stats: its statistics.
        importance: its `[O,I]` from gradients (of "foresight_loss" `[O]`), for the scores that read it; {} for the
            others.
        memory: its part of the moving average, see `PruneState`.
        counts: entries to drop, by matrix.
        key: PRNG key for adapters drawn anew.
        event: number of earlier events.
        spec: the model.
        config: the settings (its sparsity is not read).
        scale: alpha / R.

    Returns:
        The block (of its weights only what the event has moved; masks packed) and its part of the moving average.
    """
    effective = {
        name: effective_weight(layer.weights[name], layer.lora_a.get(name), layer.lora_b.get(name), scale)
        for name in LINEARS
    }
    swept: dict[str, Sweep] = {}
    if config.score == "sparsegpt":
        with jax.named_scope("sparsegpt"):
            swept = _sweep_block(layer, effective, counts, stats, config)
        masks = {name: sweep.mask for name, sweep in swept.items()}
    else:
        with jax.named_scope("foresight"):
            scores, reach = block_scores(layer, effective, stats, importance, spec, config)
        if config.ema < 1:
            scores, memory = moving_average(scores, reach, layer, stats, memory, event, config, scale)
        with jax.named_scope("select"):
            masks = _select(scores, counts, config)
    with jax.named_scope("recover"):
        layer, masks = _recover(layer, effective, masks, swept, stats, config, scale)
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


def _sweep_block(
    layer: Layer,
    effective: dict[str, Array],
    counts: dict[str, Counts],
    stats: Statistics,
    config: PruneConfig,
) -> dict[str, Sweep]:
    """SparseGPT's masks and weights. Where they are shipped, the sweep starts from the model before the event.

    Where only the mask is taken, from U, as for every other score: entries that an old mask has dropped may come back.
    """
    inverses = _inverses(counts, stats)
    ships = config.recovery == "obs"
    return {
        name: sparsegpt_on_mesh(
            name,
            weight_before(layer, effective[name], name, config) if ships else effective[name],
            inverses[INPUT_OF[name]],
            counts[name],
            matrix_group(name, config),
        )
        for name in counts
    }


def _inverses(names: Iterable[str], stats: Statistics) -> dict[str, Inverse]:
    """The factor of every input that some of the linears read, whole on every device."""
    grams = constrain_tree({INPUT_OF[name]: stats.gram[INPUT_OF[name]] for name in names})
    return {source: inverse_factor(gram) for source, gram in grams.items()}


def _recover(
    layer: Layer,
    effective: dict[str, Array],
    masks: dict[str, Array],
    swept: dict[str, Sweep],
    stats: Statistics,
    config: PruneConfig,
    scale: float,
) -> tuple[Layer, dict[str, Array]]:
    """Moves B (pbs, gram_pbs) or the base (admm, obs) to make up for what the new masks drop.

    Returns:
        The block, and the masks, which ADMM may refine.
    """
    if config.recovery == "none":
        return layer, masks
    if refits_base(config):
        return _refit_base(layer, effective, masks, swept, stats, config)
    lora_b = dict(layer.lora_b)
    # In an order that all processes share: each traces the program for itself.
    for name in (name for name in masks if name in lora_b):
        lora_a = layer.lora_a[name]
        if config.recovery == "pbs":
            energy = stats.energy[INPUT_OF[name]]
            with jax.named_scope("partial_brain_surgeon"):
                delta = split_rows(
                    lambda u, mask, a, e: partial_brain_surgeon(u, a, mask, e, config.ridge),
                    name,
                    (effective[name], masks[name]),
                    (lora_a, energy),
                )
        else:
            rows = max(1, config.chunk_mib * 2**20 // (8 * lora_a.size))
            before = weight_before(layer, effective[name], name, config)
            with jax.named_scope("gram_brain_surgeon"):
                delta = split_rows(
                    lambda u, mask, target, a, gram, rows=rows: gram_brain_surgeon(
                        u, a, mask, gram, _GRAM_RIDGE, rows, target
                    ),
                    name,
                    (effective[name], masks[name], before),
                    (lora_a, stats.input_gram(name)),
                )
        lora_b[name] = lora_b[name] + delta / scale
    return dataclasses.replace(layer, lora_b=lora_b), masks


def weight_before(layer: Layer, effective: Array, name: str, config: PruneConfig) -> Array:
    """The weight `[O,I]` that the model computed with before the event, the old mask included: what repairs aim at.

    The dense U of a model whose kept weights already make up for the pruned ones would count those twice.

    Args:
        layer: the block before the event.
        effective: U `[O,I]` of the matrix.
        name: the matrix.
        config: how the old mask acted (`mask_forward`).
    """
    mask = layer.masks.get(name)
    if mask is None or config.mask_forward == "dense":
        return effective
    left = effective - layer.weights[name].astype(jnp.float32) if config.mask_forward == "frozen" else 0.0
    return jnp.where(unpack_mask(mask, effective.shape[-1]), effective, left)


def _refit_base(
    layer: Layer,
    effective: dict[str, Array],
    masks: dict[str, Array],
    swept: dict[str, Sweep],
    stats: Statistics,
    config: PruneConfig,
) -> tuple[Layer, dict[str, Array]]:
    """New kept weights; the base takes them and the adapters start again at B = 0. And the masks."""
    targets = {name: weight_before(layer, effective[name], name, config) for name in masks}
    with jax.named_scope(config.recovery):
        if config.recovery == "admm":
            refitted, masks = _admm(targets, masks, stats, config)
        elif swept:
            refitted = {name: sweep.weight for name, sweep in swept.items()}
        else:
            refitted = _obs(targets, masks, stats)
    weights = {name: new.astype(layer.weights[name].dtype) for name, new in refitted.items()}
    lora_b = {name: jnp.zeros_like(b) if name in masks else b for name, b in layer.lora_b.items()}
    return dataclasses.replace(layer, weights=layer.weights | weights, lora_b=lora_b), masks


def _obs(targets: dict[str, Array], masks: dict[str, Array], stats: Statistics) -> dict[str, Array]:
    """SparseGPT's update under masks that another score has drawn."""
    inverses = _inverses(masks, stats)
    return {
        name: split_rows(obs_by_factor, name, (targets[name], mask), (inverses[INPUT_OF[name]],))
        for name, mask in masks.items()
    }


def _admm(
    targets: dict[str, Array], masks: dict[str, Array], stats: Statistics, config: PruneConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """ADMM on the kept weights, and the masks that it ends with."""
    refitted: dict[str, Array] = {}
    refined: dict[str, Array] = {}
    for source in INPUTS:
        names = [name for name in masks if INPUT_OF[name] == source]
        if not names:
            continue
        parts = split_rows(
            functools.partial(_refit, config=config),
            names[0],
            ([targets[name] for name in names], [masks[name] for name in names]),
            (stats.gram[source],),
        )
        refitted |= dict(zip(names, parts[0], strict=True))
        refined |= dict(zip(names, parts[1], strict=True))
    return refitted, refined


def _refit(
    targets: list[Array], masks: list[Array], gram: Array, config: PruneConfig
) -> tuple[list[Array], list[Array]]:
    """ADMM for linears that read the same input, and so share its Gram and one factorisation of it."""
    found = admm_refit(
        jnp.concatenate(targets),
        jnp.concatenate(masks),
        gram,
        steps=config.admm_steps,
        damping=config.admm_damping,
        refine=config.admm_refine,
        pattern=parse_pattern(config.group),
    )
    ends = list(itertools.accumulate(target.shape[0] for target in targets))[:-1]
    return jnp.split(found[0], ends), jnp.split(found[1], ends)


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
