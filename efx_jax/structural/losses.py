"""ATP's formulas around the generator: what it minimises, and the group lasso that empties pruned adapters.

arXiv 2412.14426, with the constants of the authors' published code where the paper gives none.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec
from efx_jax.structural.units import Space, Units, units_of

Array = jax.Array
RATIO_WEIGHT = 5.0
_STRENGTH = 1e5


def ratio_loss(kept: Array, target: float) -> Array:
    """R(p, t) = log(max(p, t) / min(p, t)): how far the kept fraction p is from t, scalar."""
    return jnp.log(jnp.maximum(kept, target) / jnp.minimum(kept, target))


def generator_loss(nll: Array, kept: Array, ratio: float) -> Array:
    """Cross entropy + 5 R(p, 1 - ratio).

    Args:
        nll: mean negative log-likelihood under soft masks, nats per token.
        kept: p, the kept fraction of the weights under hard masks.
        ratio: share of the weights to remove, in [0, 1).
    """
    return nll + RATIO_WEIGHT * ratio_loss(kept, 1.0 - ratio)


def lasso_strength(step: Array | int, total: int) -> Array:
    """beta = 1e5 log(step + 1) / log(total + 1): nothing at step 0, everything at the end; float32."""
    return _STRENGTH * jnp.log1p(jnp.asarray(step, jnp.float32)) / jnp.log1p(jnp.float32(total))


def pruned_shares(unit_masks: Mapping[str, Array], spec: ModelSpec, space: Space) -> dict[str, Array]:
    """rho: each layer's and kind's share of all pruned channels of the model, kind -> float32 `[L]`; they sum to 1.

    A unit counts once per channel (`Units.entries`), as in the authors' code, whose masks are as long as the
    projections. If nothing is pruned, all are 0.
    """
    pruned = {
        kind: units.entries * jnp.sum(~unit_masks[kind], axis=1).astype(jnp.float32)
        for kind, units in units_of(spec, space).items()
    }
    total = sum(jnp.sum(count) for count in pruned.values())
    return {kind: count / jnp.maximum(total, 1.0) for kind, count in pruned.items()}


def group_norms(adapters: Adapters, units: Units) -> Array:
    """||w_g|| of every unit of a kind: over its rows of B and its columns of A in all its linears; `[L,n]`."""
    squares: list[tuple[Array, Array]] = []
    for name, rows in units.rows.items():
        if name in adapters.lora_b:
            squares.append((jnp.sum(jnp.square(adapters.lora_b[name]), axis=2), jnp.asarray(rows)))
    for name, columns in units.columns.items():
        if name in adapters.lora_a:
            squares.append((jnp.sum(jnp.square(adapters.lora_a[name]), axis=1), jnp.asarray(columns)))
    if not squares:
        return jnp.zeros((1, units.count))
    total = jnp.zeros((squares[0][0].shape[0], units.count))
    for square, lines in squares:
        total = total.at[:, lines].add(square)
    return jnp.sqrt(total)


def proximal_step(
    adapters: Adapters,
    unit_masks: Mapping[str, Array],
    spec: ModelSpec,
    space: Space,
    strength: Array,
    learning_rate: Array | float,
) -> Adapters:
    """The group lasso's proximal step: w_g <- w_g / ||w_g|| max(0, ||w_g|| - beta rho lr) for every pruned unit g.

    Args:
        adapters: adapters after the optimizer's update.
        unit_masks: kind -> bool `[L,n]`; only units where it is False shrink.
        spec: the model.
        space: the space that the kinds belong to.
        strength: beta, see `lasso_strength`.
        learning_rate: lr of this update.
    """
    lora_a, lora_b = dict(adapters.lora_a), dict(adapters.lora_b)
    shares = pruned_shares(unit_masks, spec, space)
    for kind, units in units_of(spec, space).items():
        norms = group_norms(adapters, units)
        shrunk = jnp.maximum(norms - strength * shares[kind][:, None] * learning_rate, 0.0)
        factor = jnp.where(unit_masks[kind], 1.0, shrunk / jnp.where(norms > 0, norms, 1.0))
        for name, rows in units.rows.items():
            if name in lora_b:
                lora_b[name] = lora_b[name] * factor[:, rows, None]
        for name, columns in units.columns.items():
            if name in lora_a:
                lora_a[name] = lora_a[name] * factor[:, None, columns]
    return dataclasses.replace(adapters, lora_a=lora_a, lora_b=lora_b)
