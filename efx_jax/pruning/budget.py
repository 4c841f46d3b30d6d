"""How the zeros are shared out among the layers: the same share of each, or less where outliers are (OWL)."""

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
from efx_jax.pruning.average import prunable
from efx_jax.pruning.scores import wanda_score
from efx_jax.pruning.statistics import Statistics, collect_statistics

Array = jax.Array
# No layer keeps less than this share of what the layers keep on average.
_LEAST_KEPT = 0.1


def owl_sparsities(outliers: Sequence[float], sparsity: float, owl_lambda: float) -> tuple[float, ...]:
    """The sparsity of every layer by its share of outliers (OWL, arXiv 2310.05175, section 3).

    The shares are scaled to [0, 2 lambda] and moved so that the layers keep 1 - sparsity on average: a layer of many
    outliers keeps up to 2 lambda more than one of few. Where a layer would leave [0, 1), as none does in the paper,
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
    # Rounding must not leave the range.
    return tuple(max(0.0, float(sparsity + factor * difference)) for difference in change)


def outlier_shares(
    params: Mapping[str, Any], adapters: Adapters | None, stats: Statistics, config: PruneConfig
) -> tuple[float, ...]:
    """D of every layer: the share of its Wanda scores above `owl_multiple` times their mean, all matrices together.

    Args:
        params: parameter tree, linears `[L,O,I]`.
        adapters: adapters, or None; scored is U.
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
        mean = sum(jnp.sum(score) for score in scores) / sum(score.size for score in scores)
        return [jnp.sum(score > multiple * mean, dtype=jnp.int32) for score in scores]

    return jax.lax.map(layer, (dict(weights), dict(lora_a), dict(lora_b), dict(norms)))


def layer_budgets(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    stats: Statistics | None,
    spec: ModelSpec,
    config: PruneConfig,
) -> tuple[float, ...]:
    """The sparsity of every layer under `config.budget`.

    Args:
        params: parameter tree before the event.
        adapters: adapters, or None.
        stats: statistics of the whole model; uniform budgets need none.
        spec: the model.
        config: the settings of the event.

    Raises:
        InputError: OWL without statistics.
    """
    if config.budget == "uniform":
        return (config.sparsity,) * spec.num_layers
    if stats is None:
        raise InputError("prune.budget owl: expected statistics of the whole model, found none; collect them first")
    return owl_sparsities(outlier_shares(params, adapters, stats, config), config.sparsity, config.owl_lambda)


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
    """What `layer_budgets` needs before an event block by block: a pass without Grams, or nothing and None.

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
