"""How the zeros are distributed: evenly, fewer in layers with outliers (OWL), or by one threshold over all matrices."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.config import PruneConfig
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, effective_weight
from efx_jax.model.attention import Implementation
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer, stack_layers
from efx_jax.pruning.average import prunable
from efx_jax.pruning.block import block_scores, effective_weights
from efx_jax.pruning.scores import wanda_score
from efx_jax.pruning.selection import drop_count, drop_share
from efx_jax.pruning.statistics import Statistics, collect_statistics

Array = jax.Array
Budget = dict[str, float]
"""The sparsity of every pruned matrix of a layer."""
# Every layer and matrix keeps at least this part of the share that is kept on average.
_LEAST_KEPT = 0.1
# A threshold is found to 16 of its 32 bits, four at a time; between two such thresholds shares are interpolated.
_DIGIT, _SHIFTS = 4, (28, 24, 20, 16)


def owl_sparsities(outliers: Sequence[float], sparsity: float, owl_lambda: float) -> tuple[float, ...]:
    """The sparsity of every layer from its share of outliers (OWL, arXiv 2310.05175, section 3).

    The shares are scaled to [0, 2 lambda] and shifted so that the layers keep 1 - sparsity on average: a layer with
    many outliers keeps up to 2 lambda more than one with few. If a layer would leave [0, 1), as none does in the paper,
    all differences shrink by one factor: the average stays, and every layer keeps at least a tenth of it.

    Args:
        outliers: D, one number for each layer.
        sparsity: the average, in [0, 1).
        owl_lambda: at least 0.
    """
    shares = np.asarray(outliers, np.float64)
    spread = float(np.ptp(shares))
    kept = 2 * owl_lambda * (shares - np.min(shares)) / (spread if spread > 0 else 1.0)
    change = np.mean(kept) - kept
    room = {"below": sparsity, "above": (1 - _LEAST_KEPT) * (1 - sparsity)}
    wanted = {"below": -np.min(change), "above": np.max(change)}
    factor = min([1.0, *(room[side] / wanted[side] for side in room if wanted[side] > room[side])])
    # Rounding must not lead out of the range.
    return tuple(max(0.0, float(sparsity + factor * difference)) for difference in change)


def outlier_shares(
    params: Mapping[str, Any], adapters: Adapters | None, stats: Statistics, config: PruneConfig
) -> tuple[float, ...]:
    """D of every layer: the share of its Wanda scores above `owl_multiple` times their mean, all matrices together.

    Args:
        params: parameter tree, linears `[L,O,I]`.
        adapters: adapters, or None; U is what is scored.
        stats: statistics of the whole model.
        config: gives the matrices and the multiple.
    """
    names = prunable(params["layers"], config)
    weights = {name: params["layers"][name] for name in names}
    lora_a = {} if adapters is None else {name: a for name, a in adapters.lora_a.items() if name in weights}
    lora_b = {} if adapters is None else {name: b for name, b in adapters.lora_b.items() if name in weights}
    norms = {name: stats.input_norm(name) for name in names}
    scale = 1.0 if adapters is None else adapters.scale
    counts = np.stack(_count_outliers(weights, lora_a, lora_b, norms, config.owl_multiple, scale)).astype(np.int64)
    entries = sum(weight[0].size for weight in weights.values())
    return tuple(float(count) / entries for count in counts.sum(axis=0))


@functools.partial(jax.jit, static_argnames="scale")
def _count_outliers(
    weights: Mapping[str, Array],
    lora_a: Mapping[str, Array],
    lora_b: Mapping[str, Array],
    norms: Mapping[str, Array],
    multiple: float,
    scale: float,
) -> list[Array]:
    """Outliers of every matrix, int32 `[L]`; one layer's scores exist at a time."""

    def layer(operands: tuple[dict[str, Array], ...]) -> list[Array]:
        weights, lora_a, lora_b, norms = operands
        scores = [
            wanda_score(effective_weight(weight, lora_a.get(name), lora_b.get(name), scale), norms[name])
            for name, weight in weights.items()
        ]
        # A float, since jax takes no int of more than 31 bits.
        mean = sum(jnp.sum(score) for score in scores) / float(sum(score.size for score in scores))
        return [jnp.sum(score > multiple * mean, dtype=jnp.int32) for score in scores]

    return jax.lax.map(layer, (dict(weights), dict(lora_a), dict(lora_b), dict(norms)))


def event_budgets(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    stats: Statistics | None,
    importance: Mapping[str, Array],
    spec: ModelSpec,
    config: PruneConfig,
) -> tuple[Budget, ...]:
    """The sparsity of every pruned matrix of every layer under `config.budget`.

    Args:
        params: parameter tree before the event.
        adapters: adapters, or None.
        stats: statistics of the whole model; uniform budgets need none.
        importance: what the score reads from gradients, stacked; {} for other scores.
        spec: the model.
        config: the settings of the event.

    Raises:
        InputError: a budget other than uniform without statistics.
    """
    names = prunable(params["layers"], config)
    if config.budget == "uniform":
        return (dict.fromkeys(names, config.sparsity),) * spec.num_layers
    if stats is None:
        raise InputError(
            f"prune.budget {config.budget}: expected statistics of the whole model, found none; collect them first"
        )
    if config.budget == "owl":
        sparsities = owl_sparsities(outlier_shares(params, adapters, stats, config), config.sparsity, config.owl_lambda)
        return tuple(dict.fromkeys(names, sparsity) for sparsity in sparsities)
    return global_budgets(params, adapters, stats, importance, spec, config)


def global_budgets(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    stats: Statistics,
    importance: Mapping[str, Array],
    spec: ModelSpec,
    config: PruneConfig,
) -> tuple[Budget, ...]:
    """Share of every matrix below one threshold on the score, each within `budget_spread` of the overall sparsity.

    At this threshold the shares, clipped to their bounds, add up to the overall sparsity. What survives of a matrix
    thus depends on what its entries cost compared with those of all other matrices, provided that the score has the
    same unit in all of them, as one based on the loss does. For the arguments see `event_budgets`.

    Returns:
        name -> sparsity, for every layer: whole numbers of entries, floor(sparsity * all) together. Every matrix keeps
        at least a tenth of the average.
    """
    names = prunable(params["layers"], config)
    sizes = np.asarray([params["layers"][name][0].size for name in names], np.float64)
    low = max(0.0, config.sparsity - config.budget_spread)
    high = min(config.sparsity + config.budget_spread, 1 - _LEAST_KEPT * (1 - config.sparsity))
    stats = Statistics(stats.energy, {}, jnp.broadcast_to(stats.tokens, (spec.num_layers,)))
    scale = 1.0 if adapters is None else adapters.scale
    static = dataclasses.replace(config, sparsity=0.0)
    stacked = stack_layers(params, adapters, None)

    def shares(thresholds: np.ndarray) -> np.ndarray:
        """The clipped shares, float64 [K,L,M], at some thresholds (bit patterns, uint32 [K])."""
        # Patterns above infinity's are NaN.
        values = np.minimum(thresholds, np.float32(np.inf).view(np.uint32)).view(np.float32)
        counts = _count_below(stacked, stats, dict(importance), values, spec, static, scale)
        below = np.stack([np.asarray(counts[name], np.float64).T for name in names], axis=-1)
        return np.clip(below / sizes, low, high)

    def whole(held: np.ndarray) -> np.ndarray:
        return (held * sizes).sum(axis=(-2, -1)) / (sizes.sum() * spec.num_layers)

    start = 0
    for shift in _SHIFTS:
        # The highest digit has no sign bit.
        digits = range(1, 2 ** (_DIGIT - (shift == _SHIFTS[0])))
        candidates = np.asarray([start | (digit << shift) for digit in digits], np.uint32)
        start |= int(np.sum(whole(shares(candidates)) < config.sparsity)) << shift
    below, above = shares(np.asarray([start, start + (1 << _SHIFTS[-1])], np.uint32))
    reached = whole(below), whole(above)
    step = (config.sparsity - reached[0]) / (reached[1] - reached[0]) if reached[1] > reached[0] else 0.0
    counts = _whole_counts((below + np.clip(step, 0.0, 1.0) * (above - below)) * sizes, config.sparsity, sizes)
    found = drop_share(counts, sizes)
    return tuple(dict(zip(names, map(float, layer), strict=True)) for layer in found)


def _whole_counts(wanted: np.ndarray, sparsity: float, sizes: np.ndarray) -> np.ndarray:
    """Entries that every matrix loses, in whole numbers; what rounding down leaves goes to the largest remainders.

    Args:
        wanted: float64 [L,M].
        sparsity: of all together.
        sizes: entries of each of the M matrices.
    """
    counts = np.floor(wanted + 1e-9)
    missing = drop_count(sparsity, int(sizes.sum()) * len(wanted)) - int(counts.sum())
    order = np.argsort(counts - wanted, axis=None, kind="stable")
    counts.flat[order[: max(0, missing)]] += 1
    return counts


@functools.partial(jax.jit, static_argnames=("spec", "config", "scale"))
def _count_below(
    stacked: Layer,
    stats: Statistics,
    importance: dict[str, Array],
    thresholds: Array,
    spec: ModelSpec,
    config: PruneConfig,
    scale: float,
) -> dict[str, Array]:
    """How many scores of each matrix are below each threshold `[K]`: int32 `[L,K]`; one layer's exist at a time."""

    def layer(operands: tuple[Layer, Statistics, dict[str, Array]]) -> dict[str, Array]:
        block, stats, importance = operands
        effective = effective_weights(block, scale)
        scores, _ = block_scores(block, effective, stats, importance, spec, config)
        return {
            name: jnp.stack([jnp.sum(score < threshold, dtype=jnp.int32) for threshold in thresholds])
            for name, score in scores.items()
        }

    return jax.lax.map(layer, (stacked, stats, importance))


def budget_statistics(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    batches: Iterable[Mapping[str, Any]],
    spec: ModelSpec,
    config: PruneConfig,
    compute_dtype: Any = None,
    attention_path: Implementation = "xla",
) -> Statistics | None:
    """What `event_budgets` needs before a block-by-block event: a pass without Grams, or None if it needs nothing.

    For arguments and errors see `collect_statistics`.
    """
    if config.budget == "uniform":
        return None
    return collect_statistics(
        params,
        batches,
        spec,
        adapters,
        masks,
        mask_forward=config.mask_forward,
        compute_dtype=compute_dtype,
        attention_path=attention_path,
    )
