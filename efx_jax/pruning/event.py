"""One prune event: score -> moving average -> mask -> recovery, block by block in one compiled program.

`prune_event` takes statistics of the whole model (one pass). `prune_event_sequential` collects them block by block, each
block seeing the pruned blocks before it. Both run the same `prune_block`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.config import PruneConfig
from efx_jax.lora import Adapters, effective_weight, init_lora_matrices
from efx_jax.model.decoder import Layer, attend_within, block, embed, stack_layers
from efx_jax.model.layers import rope_tables
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.pruning.recovery import admm_update, gram_brain_surgeon, partial_brain_surgeon
from efx_jax.pruning.scores import activation_reach, foresight_score, wanda_score, weight_reach
from efx_jax.pruning.selection import Counts, drop_by_counts, selection_counts
from efx_jax.pruning.statistics import (
    INPUT_OF,
    INPUTS,
    Statistics,
    add_statistics,
    block_statistics,
    layer_options,
    real_tokens,
)

Array = jax.Array
_GRAM_RIDGE = 1e-3


@struct.dataclass
class PruneState:
    """What the moving average remembers; arrays lead with L.

    `event`: number of events done. While the base is frozen, the earlier scores are rebuilt exactly from `snapshots` of
    the last E events: `lora_a/<name> [L,E,R,I]`, `lora_b/<name> [L,E,O,R]`, `input_norm/<input> [L,E,I]`,
    `reach/<name> [L,E,O]` (about 1 % of the weights). Where events move the base, `score/<name> [L,O,I]` holds the
    average itself. Both are {} when `ema` is 1.
    """

    event: Array
    snapshots: dict[str, Array]
    score: dict[str, Array]
    key: Array


def moves_base(config: PruneConfig) -> bool:
    """Whether an event rewrites the base weights."""
    return config.merge_each_event or config.recovery == "admm"


def init_prune_state(
    params: Mapping[str, Any], adapters: Adapters | None, config: PruneConfig, key: Array, events: int = 8
) -> PruneState:
    """An empty state.

    Args:
        params: parameter tree; only shapes are read.
        adapters: adapters, or None.
        config: the pruning settings.
        key: PRNG key for adapters drawn at events.
        events: number of earlier events that the moving average can rebuild; older ones weigh (1 - ema)^events.
    """
    layers = params["layers"]
    names = prunable(layers, config)
    snapshots: dict[str, Array] = {}
    score: dict[str, Array] = {}
    if config.ema < 1 and moves_base(config):
        score = {name: jnp.zeros(layers[name].shape, jnp.float32) for name in names}
    elif config.ema < 1:
        for name in names:
            num_layers, out_dim, in_dim = layers[name].shape
            snapshots[f"reach/{name}"] = jnp.zeros((num_layers, events, out_dim), jnp.float32)
            snapshots[f"input_norm/{INPUT_OF[name]}"] = jnp.zeros((num_layers, events, in_dim), jnp.float32)
            if adapters is not None and name in adapters.lora_a:
                lora_a, lora_b = adapters.lora_a[name], adapters.lora_b[name]
                snapshots[f"lora_a/{name}"] = jnp.zeros((num_layers, events, *lora_a.shape[1:]), jnp.float32)
                snapshots[f"lora_b/{name}"] = jnp.zeros((num_layers, events, *lora_b.shape[1:]), jnp.float32)
    return PruneState(event=jnp.int32(0), snapshots=snapshots, score=score, key=key)


def prunable(layers: Mapping[str, Array], config: PruneConfig) -> tuple[str, ...]:
    """Names of the linears that the event prunes, in the model's order."""
    return tuple(name for name in LINEARS if name in layers and name in config.targets)


def needs_gram(config: PruneConfig) -> bool:
    """Whether the recovery reads Gram matrices."""
    return config.recovery in ("gram_pbs", "admm")


def prune_event(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    stats: Statistics,
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    """Draws new masks and repairs the model (paper, Algorithm 1, the body of its epoch loop after training).

    Args:
        params: parameter tree, linears `[L,O,I]`.
        adapters: adapters, or None (then U = W).
        masks: masks in force, or None before the first event.
        stats: `collect_statistics` of the model as it stands; with Grams for gram_pbs and admm.
        state: the state of the earlier events, or None at the first.
        spec: the model.
        config: score, group, sparsity, recovery and moving average of this event.

    Returns:
        (params, adapters, masks, state). params changes only where an event moves the base (admm, merge_each_event).

    Raises:
        InputError: a sparsity or group that does not fit, statistics without Grams.
    """
    names = prunable(params["layers"], config)
    if needs_gram(config):
        stats.input_gram(names[0])
    if state is None:
        state = init_prune_state(params, adapters, config, jax.random.key(0))
    counts = event_counts(params["layers"], names, config)
    layers = stack_layers(params, adapters, masks)
    scale = 1.0 if adapters is None else adapters.scale
    keys = jax.random.split(jax.random.fold_in(state.key, state.event), spec.num_layers)
    layers, memory = _prune_blocks(
        layers, stats, _memory(state), counts, keys, state.event, spec, _without_sparsity(config), scale
    )
    return _unstack(params, adapters, layers, memory, state)


def prune_event_sequential(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    batches: Iterable[Mapping[str, Array]],
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
    *,
    compute_dtype: Any = None,
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    """As `prune_event`, but every block is calibrated on the outputs of the already pruned blocks before it (Wanda).

    Args:
        batches: dictionaries with `tokens [B,T]` and `lengths [B]`; their hidden states are kept between blocks.
        compute_dtype: dtype of the matmul operands of the calibration passes.

    The other arguments, returns and errors are those of `prune_event`.
    """
    if state is None:
        state = init_prune_state(params, adapters, config, jax.random.key(0))
    counts = event_counts(params["layers"], prunable(params["layers"], config), config)
    scale = 1.0 if adapters is None else adapters.scale
    static = _without_sparsity(config)
    keys = jax.random.split(jax.random.fold_in(state.key, state.event), spec.num_layers)
    stacked, memory = stack_layers(params, adapters, masks), _memory(state)
    hidden = [
        (embed(params, jnp.asarray(batch["tokens"])), real_tokens(batch["tokens"], jnp.asarray(batch["lengths"])))
        for batch in batches
    ]
    done = []
    for index in range(spec.num_layers):
        layer, past = jax.tree.map(lambda leaf, i=index: leaf[i], (stacked, memory))
        total: Statistics | None = None
        for x, real in hidden:
            stats = _one_block_statistics(x, real, layer, spec, needs_gram(config), scale, config, compute_dtype)
            total = stats if total is None else add_statistics(total, stats)
        assert total is not None
        done.append(_prune_block_jit(layer, total, past, counts, keys[index], state.event, spec, static, scale))
        hidden = [(_block_output(x, done[-1][0], spec, scale, compute_dtype), real) for x, real in hidden]
    layers, memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
    return _unstack(params, adapters, layers, memory, state)


def event_counts(layers: Mapping[str, Array], names: tuple[str, ...], config: PruneConfig) -> dict[str, Counts]:
    """Exact counts per matrix, computed on the host so that a new sparsity needs no new program."""
    return {
        name: selection_counts(layers[name].shape, config.sparsity, matrix_group(name, config), config.bound)
        for name in names
    }


def matrix_group(name: str, config: PruneConfig) -> str:
    """The comparison group of one matrix."""
    return "row" if name in config.row_targets and config.group in ("matrix", "bounded") else config.group


def block_scores(
    layer: Layer, effective: Mapping[str, Array], stats: Statistics, spec: ModelSpec, config: PruneConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Scores `[O,I]` and downstream reach nu `[O]` of the pruned matrices of one block."""
    names = prunable(layer.weights, config)
    ones = {name: jnp.ones(effective[name].shape[0], jnp.float32) for name in names}
    if config.score == "magnitude":
        return {name: jnp.abs(effective[name]) for name in names}, ones
    if config.score == "wanda":
        return {name: wanda_score(effective[name], stats.input_norm(name)) for name in names}, ones
    if config.score == "foresight":
        reach = weight_reach(effective, spec)
    else:
        reach = activation_reach(effective, layer.weights, stats, spec)
    return {name: foresight_score(effective[name], stats.input_norm(name), reach[name]) for name in names}, reach


def prune_block(
    layer: Layer,
    stats: Statistics,
    memory: dict[str, dict[str, Array]],
    counts: dict[str, Counts],
    key: Array,
    event: Array,
    spec: ModelSpec,
    config: PruneConfig,
    scale: float,
) -> tuple[Layer, dict[str, dict[str, Array]]]:
    """The event for one block: score, moving average, selection, recovery, merge.

    Args:
        layer: the block's arrays, without L.
        stats: its statistics.
        memory: its part of the moving average, see `PruneState`.
        counts: entries to drop, by matrix.
        key: PRNG key for adapters drawn anew.
        event: number of earlier events.
        spec: the model.
        config: the settings (its sparsity is not read).
        scale: alpha / R.
    """
    effective = {
        name: effective_weight(layer.weights[name], layer.lora_a.get(name), layer.lora_b.get(name), scale)
        for name in LINEARS
    }
    scores, reach = block_scores(layer, effective, stats, spec, config)
    if config.ema < 1:
        scores, memory = _moving_average(scores, reach, layer, stats, memory, event, config, scale)
    with jax.named_scope("select"):
        masks = {
            name: ~drop_by_counts(scores[name], matrix_group(name, config), counts[name]) for name in scores
        }
    with jax.named_scope("recover"):
        layer = _recover(layer, effective, masks, stats, config, scale)
    layer = layer.replace(masks=layer.masks | masks)
    if config.merge_each_event:
        layer = _merge_and_redraw(layer, key, scale)
    return layer, memory


def _moving_average(
    scores: dict[str, Array],
    reach: dict[str, Array],
    layer: Layer,
    stats: Statistics,
    memory: dict[str, dict[str, Array]],
    event: Array,
    config: PruneConfig,
    scale: float,
) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
    """S_t = eta * new + (1 - eta) * S_(t-1), the first event's score being raw (paper, Algorithm 1)."""
    if memory["score"]:
        averaged = {
            name: jnp.where(event == 0, new, config.ema * new + (1 - config.ema) * memory["score"][name])
            for name, new in scores.items()
        }
        return averaged, {**memory, "score": averaged}
    past = memory["snapshots"]
    slots = past[f"reach/{next(iter(scores))}"].shape[0]
    stored = jnp.minimum(event, slots)
    averaged = {}
    for name, new in scores.items():

        def older(slot: Array, average: Array, name: str = name) -> Array:
            effective = effective_weight(
                layer.weights[name], _slot(past, f"lora_a/{name}", slot), _slot(past, f"lora_b/{name}", slot), scale
            )
            score = jnp.abs(effective)
            if config.score != "magnitude":
                score = score * past[f"input_norm/{INPUT_OF[name]}"][slot]
            score = score * past[f"reach/{name}"][slot][:, None]
            return jnp.where(slot == 0, score, config.ema * score + (1 - config.ema) * average)

        average = jax.lax.fori_loop(0, stored, older, jnp.zeros_like(new))
        averaged[name] = jnp.where(event == 0, new, config.ema * new + (1 - config.ema) * average)
    return averaged, {**memory, "snapshots": _remember(past, reach, layer, stats, stored, slots)}


def _slot(past: Mapping[str, Array], name: str, slot: Array) -> Array | None:
    return past[name][slot] if name in past else None


def _remember(
    past: dict[str, Array], reach: dict[str, Array], layer: Layer, stats: Statistics, stored: Array, slots: int
) -> dict[str, Array]:
    """Writes this event behind the stored ones; when all slots are taken, the oldest makes room."""
    full = stored == slots
    sources = {"lora_a": layer.lora_a, "lora_b": layer.lora_b, "reach": reach}
    remembered = {}
    for name, values in past.items():
        kind, leaf = name.split("/")
        new = jnp.sqrt(stats.energy[leaf]) if kind == "input_norm" else sources[kind][leaf]
        moved = jnp.where(full, jnp.roll(values, -1, axis=0), values)
        remembered[name] = moved.at[jnp.minimum(stored, slots - 1)].set(new)
    return remembered


def _recover(
    layer: Layer,
    effective: dict[str, Array],
    masks: dict[str, Array],
    stats: Statistics,
    config: PruneConfig,
    scale: float,
) -> Layer:
    """Moves B (pbs, gram_pbs) or the base (admm) to make up for what the new masks drop."""
    if config.recovery == "none":
        return layer
    if config.recovery == "admm":
        return _refit_base(layer, effective, masks, stats, config)
    lora_b = dict(layer.lora_b)
    for name in set(masks) & set(lora_b):
        lora_a = layer.lora_a[name]
        if config.recovery == "pbs":
            energy = stats.energy[INPUT_OF[name]]
            delta = partial_brain_surgeon(effective[name], lora_a, masks[name], energy, config.ridge)
        else:
            rows = max(1, config.chunk_mib * 2**20 // (8 * lora_a.size))
            gram = stats.input_gram(name)
            delta = gram_brain_surgeon(effective[name], lora_a, masks[name], gram, _GRAM_RIDGE, rows)
        lora_b[name] = lora_b[name] + delta / scale
    return layer.replace(lora_b=lora_b)


def _refit_base(
    layer: Layer, effective: dict[str, Array], masks: dict[str, Array], stats: Statistics, config: PruneConfig
) -> Layer:
    """ADMM on the kept weights; the base takes the result and the adapters start again at B = 0.

    The target is the model as it was before the event, the old mask included: the dense U of a model whose kept weights
    already make up for the pruned ones would count those twice.
    """
    weights, lora_b = dict(layer.weights), dict(layer.lora_b)
    for source in INPUTS:
        # Linears that read the same input share its Gram, and with it one factorisation.
        names = [name for name in masks if INPUT_OF[name] == source]
        if not names:
            continue
        before = [jnp.where(layer.masks[n], effective[n], 0.0) if n in layer.masks else effective[n] for n in names]
        target = jnp.concatenate(before)
        mask = jnp.concatenate([masks[name] for name in names])
        refitted = admm_update(
            target, mask, stats.gram[source], steps=config.admm_steps, damping=config.admm_damping
        )
        sizes = [masks[name].shape[0] for name in names]
        offset = 0
        for name, size in zip(names, sizes, strict=True):
            weights[name] = refitted[offset : offset + size].astype(weights[name].dtype)
            offset += size
    lora_b = {name: jnp.zeros_like(b) if name in masks else b for name, b in lora_b.items()}
    return layer.replace(weights=weights, lora_b=lora_b)


def _merge_and_redraw(layer: Layer, key: Array, scale: float) -> Layer:
    """W = mask * U and fresh adapters, as the authors' code does at each event."""
    weights = dict(layer.weights)
    for name in {*layer.lora_a, *layer.masks}:
        effective = effective_weight(weights[name], layer.lora_a.get(name), layer.lora_b.get(name), scale)
        mask = layer.masks.get(name)
        merged = effective if mask is None else jnp.where(mask, effective, 0.0)
        weights[name] = merged.astype(weights[name].dtype)
    if not layer.lora_a:
        return layer.replace(weights=weights)
    rank = next(iter(layer.lora_a.values())).shape[0]
    lora_a, lora_b = init_lora_matrices(key, {n: (1, *weights[n].shape) for n in layer.lora_a}, rank)
    return layer.replace(
        weights=weights,
        lora_a={name: a[0] for name, a in lora_a.items()},
        lora_b={name: b[0] for name, b in lora_b.items()},
    )


def _without_sparsity(config: PruneConfig) -> PruneConfig:
    """The static part: the counts carry the sparsity."""
    return dataclasses.replace(config, sparsity=0.0)


def _memory(state: PruneState) -> dict[str, dict[str, Array]]:
    return {"snapshots": state.snapshots, "score": state.score}


def _unstack(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    layers: Layer,
    memory: dict[str, dict[str, Array]],
    state: PruneState,
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    new_state = state.replace(event=state.event + 1, snapshots=memory["snapshots"], score=memory["score"])
    if adapters is not None:
        adapters = adapters.replace(lora_a=layers.lora_a, lora_b=layers.lora_b)
    return {**params, "layers": layers.weights}, adapters, layers.masks, new_state


@functools.partial(jax.jit, static_argnames=("spec", "config", "scale"))
def _prune_blocks(
    layers: Layer,
    stats: Statistics,
    memory: dict[str, dict[str, Array]],
    counts: dict[str, Counts],
    keys: Array,
    event: Array,
    spec: ModelSpec,
    config: PruneConfig,
    scale: float,
) -> tuple[Layer, dict[str, dict[str, Array]]]:
    def one(scanned: tuple[Any, ...]) -> tuple[Layer, dict[str, dict[str, Array]]]:
        layer, block_stats, past, key = scanned
        return prune_block(layer, block_stats, past, counts, key, event, spec, config, scale)

    tokens = jnp.broadcast_to(stats.tokens, (spec.num_layers,))
    return jax.lax.map(one, (layers, stats.replace(tokens=tokens), memory, keys))


_prune_block_jit = functools.partial(jax.jit, static_argnames=("spec", "config", "scale"))(prune_block)


@functools.partial(jax.jit, static_argnames=("spec", "gram", "scale", "config", "compute_dtype"))
def _one_block_statistics(
    x: Array,
    real: Array,
    layer: Layer,
    spec: ModelSpec,
    gram: bool,
    scale: float,
    config: PruneConfig,
    compute_dtype: Any,
) -> Statistics:
    """Statistics of one block on the hidden states `[B,T,D]` that reach it."""
    options = dataclasses.replace(layer_options(None, config.mask_forward, compute_dtype), scale=scale)
    _, taps, _ = block(x, layer, spec, options, _rope(x, spec), attend_within(x.shape[1], None))
    return block_statistics(taps, real, gram)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "compute_dtype"))
def _block_output(x: Array, layer: Layer, spec: ModelSpec, scale: float, compute_dtype: Any) -> Array:
    """The block's output as it will be shipped: always through the exact mask."""
    options = dataclasses.replace(layer_options(None, "exact", compute_dtype), scale=scale)
    return block(x, layer, spec, options, _rope(x, spec), attend_within(x.shape[1], None))[0]


def _rope(x: Array, spec: ModelSpec) -> tuple[Array, Array]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return rope_tables(spec.rope, spec.head_dim, positions)
