"""The moving average of the scores over events, rebuilt from adapter snapshots where the base is frozen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.config import PruneConfig
from efx_jax.config_event import keeps_scores
from efx_jax.lora import Adapters, effective_weight
from efx_jax.model.spec import LINEARS
from efx_jax.model.stack import Layer
from efx_jax.pruning.scores import matrix_score
from efx_jax.pruning.statistics import INPUT_OF, Statistics

Array = jax.Array
Memory = dict[str, dict[str, Array]]


@struct.dataclass
class PruneState:
    """What the moving average remembers; arrays have a leading axis L.

    `event`: number of events done. While the base is frozen, the earlier scores are rebuilt exactly from `snapshots` of
    the last E events: `lora_a/<name> [L,E,R,I]`, `lora_b/<name> [L,E,O,R]`, `input_norm/<input> [L,E,I]`,
    `reach/<name> [L,E,O]` (about 1 % of the weights). If `keeps_scores`, `score` holds the average itself, name -> L
    arrays `[O,I]` in host memory, () before the first event. Both are {} when `ema` is 1.
    """

    event: Array
    snapshots: dict[str, Array]
    score: dict[str, tuple[Array, ...]]
    key: Array


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
    score: dict[str, tuple[Array, ...]] = {}
    if config.ema < 1 and keeps_scores(config):
        score = dict.fromkeys(names, ())
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


def moving_average(
    scores: dict[str, Array],
    reach: dict[str, Array],
    layer: Layer,
    stats: Statistics,
    memory: Memory,
    event: Array,
    config: PruneConfig,
    scale: float,
) -> tuple[dict[str, Array], Memory]:
    """S_t = eta * new + (1 - eta) * S_(t-1), where S of the first event is its raw score (paper, Algorithm 1)."""
    if keeps_scores(config):
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
            norm, reach = past[f"input_norm/{INPUT_OF[name]}"][slot], past[f"reach/{name}"][slot]
            score = matrix_score(effective, norm, reach, config)
            return jnp.where(slot == 0, score, config.ema * score + (1 - config.ema) * average)

        average = jax.lax.fori_loop(0, stored, older, jnp.zeros_like(new))
        averaged[name] = jnp.where(event == 0, new, config.ema * new + (1 - config.ema) * average)
    return averaged, {**memory, "snapshots": _remember(past, reach, layer, stats, stored, slots)}


def _slot(past: Mapping[str, Array], name: str, slot: Array) -> Array | None:
    return past[name][slot] if name in past else None


def _remember(
    past: dict[str, Array], reach: dict[str, Array], layer: Layer, stats: Statistics, stored: Array, slots: int
) -> dict[str, Array]:
    """Writes this event after the stored ones; when all slots are taken, the oldest is dropped."""
    full = stored == slots
    sources = {"lora_a": layer.lora_a, "lora_b": layer.lora_b, "reach": reach}
    remembered = {}
    for name, values in past.items():
        kind, leaf = name.split("/")
        new = jnp.sqrt(stats.energy[leaf]) if kind == "input_norm" else sources[kind][leaf]
        moved = jnp.where(full, jnp.roll(values, -1, axis=0), values)
        remembered[name] = moved.at[jnp.minimum(stored, slots - 1)].set(new)
    return remembered
