"""How an event repairs one block under its new masks: by updating B, by updating A and B, or by refitting the base."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from efx_jax.config import PruneConfig
from efx_jax.config_event import refits_base
from efx_jax.einsum import einsum
from efx_jax.masks import unpack_mask
from efx_jax.model.stack import Layer
from efx_jax.parallel.partition import constrain_tree, split_rows
from efx_jax.pruning.adapter_refit import alternate_a, spectral_a, with_norms_of
from efx_jax.pruning.recovery import admm_refit, dense_path_shift, gram_brain_surgeon, partial_brain_surgeon
from efx_jax.pruning.selection import parse_pattern
from efx_jax.pruning.sparsegpt import Inverse, Sweep, inverse_factor, obs_by_factor
from efx_jax.pruning.statistics import INPUT_OF, INPUTS, Statistics

Array = jax.Array
_GRAM_RIDGE = 1e-3


def recover_block(
    layer: Layer,
    effective: dict[str, Array],
    targets: dict[str, Array],
    masks: dict[str, Array],
    swept: dict[str, Sweep],
    stats: Statistics,
    config: PruneConfig,
    scale: float,
) -> tuple[Layer, dict[str, Array]]:
    """Updates the adapters (pbs, gram_pbs) or the base (admm, obs) to compensate for what the new masks drop.

    Args:
        layer: the block before the event.
        effective: its U `[O,I]` by name.
        targets: weights `[O,I]` to stay close to, see `recovery_targets`.
        masks: the new masks `[O,I]`, True = kept.
        swept: SparseGPT's masks and weights; {} for other scores.
        stats: the block's statistics.
        config: the settings.
        scale: alpha / R.

    Returns:
        The block, and the masks, which ADMM may have refined.
    """
    if config.recovery == "none":
        return layer, masks
    if refits_base(config):
        return _refit_base(layer, targets, masks, swept, stats, config)
    lora_a, lora_b = dict(layer.lora_a), dict(layer.lora_b)
    # In the same order in all processes: each of them traces the program itself.
    for name in [name for name in masks if name in lora_b]:
        u, mask, a, target = effective[name], masks[name], lora_a[name], targets[name]
        if config.recovery == "pbs":
            with jax.named_scope("partial_brain_surgeon"):
                delta = _partial_surgeon(name, u, a, mask, stats.energy[INPUT_OF[name]], config)
            lora_b[name] = lora_b[name] + delta / scale
        elif config.pbs_rounds:
            with jax.named_scope("gram_brain_surgeon"):
                base = layer.weights[name].astype(jnp.float32)
                lora_a[name], new = _refit_adapter(name, base, a, mask, stats.input_gram(name), target, config)
            lora_b[name] = new / scale
        else:
            with jax.named_scope("gram_brain_surgeon"):
                delta = _gram_surgeon(name, u, a, mask, stats.input_gram(name), target, config)
            lora_b[name] = lora_b[name] + delta / scale
    return dataclasses.replace(layer, lora_a=lora_a, lora_b=lora_b), masks


def _partial_surgeon(
    name: str, weight: Array, lora_a: Array, mask: Array, input_energy: Array, config: PruneConfig
) -> Array:
    """The change `[O,R]` of scale * B by the paper's eq. 4."""
    return split_rows(
        lambda u, mask, a, energy: partial_brain_surgeon(u, a, mask, energy, config.ridge),
        name,
        (weight, mask),
        (lora_a, input_energy),
    )


def _gram_surgeon(
    name: str, weight: Array, lora_a: Array, mask: Array, gram: Array, target: Array, config: PruneConfig
) -> Array:
    """The change `[O,R]` of scale * B that brings mask * U closest to the target."""
    rows = max(1, config.chunk_mib * 2**20 // (8 * lora_a.size))
    return split_rows(
        lambda u, mask, target, a, gram: gram_brain_surgeon(u, a, mask, gram, _GRAM_RIDGE, rows, target),
        name,
        (weight, mask, target),
        (lora_a, gram),
    )


def _refit_adapter(
    name: str, base: Array, lora_a: Array, mask: Array, gram: Array, target: Array, config: PruneConfig
) -> tuple[Array, Array]:
    """New A and scale * B: under the mask, their rank-R product supplies what the masked base lacks of the target."""
    lost = target - jnp.where(mask, base, 0.0)
    lora_a = spectral_a(lost, gram, lora_a)
    lora_b = _gram_surgeon(name, base, lora_a, mask, gram, target, config)
    for _ in range(config.pbs_rounds - 1):
        lora_a = with_norms_of(lora_a, alternate_a(lora_a, lora_b, mask, lost, gram))
        lora_b = _gram_surgeon(name, base, lora_a, mask, gram, target, config)
    return lora_a, lora_b


def recovery_targets(
    layer: Layer, effective: dict[str, Array], names: Iterable[str], stats: Statistics, config: PruneConfig
) -> dict[str, Array]:
    """The weights `[O,I]` whose outputs recovery stays close to.

    Args:
        layer: the block before the event.
        effective: its U `[O,I]` by name.
        names: the pruned linears.
        stats: the block's statistics; with `dense_path` also `cross`.
        config: the settings.
    """
    targets = {name: weight_before(layer, effective[name], name, config) for name in names}
    if not config.dense_path:
        return targets
    read = dict.fromkeys(INPUT_OF[name] for name in targets)
    with jax.named_scope("dense_path"):
        whole = constrain_tree({source: (stats.gram[source], stats.cross[source]) for source in read})
        shifts = {source: config.dense_path * dense_path_shift(*pair) for source, pair in whole.items()}
        return {
            name: split_rows(lambda w, f: w + einsum("oi,ij->oj", w, f), name, (target,), (shifts[INPUT_OF[name]],))
            for name, target in targets.items()
        }


def weight_before(layer: Layer, effective: Array, name: str, config: PruneConfig) -> Array:
    """The weight `[O,I]` that the model used before the event, old mask included: the target of recovery.

    If the kept weights already compensate for the pruned ones, the dense U would count the pruned ones twice.

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
    targets: dict[str, Array],
    masks: dict[str, Array],
    swept: dict[str, Sweep],
    stats: Statistics,
    config: PruneConfig,
) -> tuple[Layer, dict[str, Array]]:
    """The block with new kept weights in the base and adapters that start again at B = 0; and the masks."""
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
    """SparseGPT's update under masks that another score has chosen."""
    factors = inverses(masks, stats)
    return {
        name: split_rows(obs_by_factor, name, (targets[name], mask), (factors[INPUT_OF[name]],))
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
    """ADMM for linears that read the same input and so share its Gram and one factorisation of it."""
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


def inverses(names: Iterable[str], stats: Statistics) -> dict[str, Inverse]:
    """The inverse factor of every input that the given linears read, whole on every device."""
    grams = constrain_tree({INPUT_OF[name]: stats.gram[INPUT_OF[name]] for name in names})
    return {source: inverse_factor(gram) for source, gram in grams.items()}
