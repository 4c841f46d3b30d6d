"""What a structural mask can remove: units of a block, and the rows and columns of its linears that belong to each.

ATP (arXiv 2412.14426) learns which units go. A mask of units is bool `[L,n]`, True = kept, n units in every block.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.config import Space
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.masks import pack_mask
from efx_jax.model.spec import ModelSpec, linear_shapes

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """One kind of unit of a block.

    Attributes:
        count: n, units in a block.
        rows: linear -> unit of every output row, int `[O]`; these rows (and their biases) are removed with the unit.
        columns: linear -> unit of every input column, int `[I]`.
        scaled: linears whose outputs a soft mask multiplies, and the power of the mask; enough to switch the unit off.
        entries: channels of one unit, counted where its kind is masked: rows of k, v or up.
    """

    count: int
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    scaled: dict[str, int]
    entries: int


def units_of(spec: ModelSpec, space: Space) -> dict[str, Units]:
    """The kinds of units by name.

    "paper" is ATP's first space: `key_dims`, head dimensions of q and k, n = H/2 because RoPE rotates (j, j + H/2) into
    each other and both must go; `value_dims`, head dimensions of v with the matching columns of o, n = H; both kinds
    are shared by all heads of a block. "sliceable" is ours: `heads`, a key/value head with its G query heads, n = K.
    Both spaces have `hidden`, the MLP's units, n = F. Every weight of the seven linears belongs to exactly one unit.

    Raises:
        InputError: an unknown space.
    """
    if space == "sliceable":
        return {"heads": _heads(spec), "hidden": _hidden(spec)}
    if space == "paper":
        return {"key_dims": _key_dims(spec), "value_dims": _value_dims(spec), "hidden": _hidden(spec)}
    raise InputError(f"space: expected one of {', '.join(get_args(Space))}, found {space!r}")


def _hidden(spec: ModelSpec) -> Units:
    lines = np.arange(spec.intermediate_size)
    return Units(
        count=spec.intermediate_size,
        rows={"gate_proj": lines, "up_proj": lines},
        columns={"down_proj": lines},
        scaled={"up_proj": 2},
        entries=1,
    )


def _heads(spec: ModelSpec) -> Units:
    key_lines = np.repeat(np.arange(spec.num_kv_heads), spec.head_dim)
    query_lines = np.repeat(np.arange(spec.num_kv_heads), spec.num_heads // spec.num_kv_heads * spec.head_dim)
    return Units(
        count=spec.num_kv_heads,
        rows={"q_proj": query_lines, "k_proj": key_lines, "v_proj": key_lines},
        columns={"o_proj": query_lines},
        scaled={"v_proj": 1},
        entries=spec.head_dim,
    )


def _key_dims(spec: ModelSpec) -> Units:
    pairs = np.tile(np.arange(spec.head_dim // 2), 2)
    return Units(
        count=spec.head_dim // 2,
        rows={"q_proj": np.tile(pairs, spec.num_heads), "k_proj": np.tile(pairs, spec.num_kv_heads)},
        columns={},
        scaled={"q_proj": 1, "k_proj": 1},
        entries=2 * spec.num_kv_heads,
    )


def _value_dims(spec: ModelSpec) -> Units:
    dims = np.arange(spec.head_dim)
    return Units(
        count=spec.head_dim,
        rows={"v_proj": np.tile(dims, spec.num_kv_heads)},
        columns={"o_proj": np.tile(dims, spec.num_heads)},
        scaled={"v_proj": 1},
        entries=spec.num_kv_heads,
    )


def unit_weights(units: Units, spec: ModelSpec) -> int:
    """Weights of the seven linears that one unit holds."""
    shapes = linear_shapes(spec)
    rows = sum(len(lines) * shapes[name][1] for name, lines in units.rows.items())
    columns = sum(len(lines) * shapes[name][0] for name, lines in units.columns.items())
    return (rows + columns) // units.count


def kept_fraction(unit_masks: Mapping[str, Array], spec: ModelSpec, space: Space) -> Array:
    """p: the share of the weights of the seven linears that the masks keep, float32; differentiable in float masks."""
    kept = jnp.float32(0)
    for kind, units in units_of(spec, space).items():
        kept += unit_weights(units, spec) * jnp.sum(unit_masks[kind].astype(jnp.float32))
    # A float, since jax takes no int of more than 31 bits.
    return kept / float(spec.num_layers * sum(math.prod(shape) for shape in linear_shapes(spec).values()))


def weight_masks(unit_masks: Mapping[str, Array], spec: ModelSpec, space: Space) -> dict[str, Array]:
    """The masks of units as masks of weights, as `forward` takes them.

    Args:
        unit_masks: kind -> bool `[L,n]`.
        spec: the model.
        space: the space that the kinds belong to.

    Returns:
        linear -> packed mask, uint8 `[L,O,ceil(I/8)]` (`efx_jax.masks`), for each of the seven.
    """
    masks = {}
    shapes = linear_shapes(spec)
    for kind, units in units_of(spec, space).items():
        lines = {name: unit_masks[kind][:, rows, None] for name, rows in units.rows.items()}
        lines |= {name: unit_masks[kind][:, None, columns] for name, columns in units.columns.items()}
        for name, line in lines.items():
            out_dim, in_dim = shapes[name]
            packed = pack_mask(jnp.broadcast_to(line, (*line.shape[:2], in_dim)))
            masks[name] = jnp.broadcast_to(packed, (spec.num_layers, out_dim, packed.shape[-1]))
    return masks


def without_pruned_biases(
    params: Mapping[str, Any], unit_masks: Mapping[str, Array], spec: ModelSpec, space: Space
) -> dict[str, Any]:
    """The parameter tree with the biases of pruned rows set to 0, which no mask of weights can do."""
    layers = dict(params["layers"])
    for kind, units in units_of(spec, space).items():
        for name, rows in units.rows.items():
            if name in spec.biases:
                layers[f"{name}_bias"] = jnp.where(unit_masks[kind][:, rows], layers[f"{name}_bias"], 0)
    return {**params, "layers": layers}


def soften(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    soft_masks: Mapping[str, Array],
    spec: ModelSpec,
    space: Space,
) -> tuple[dict[str, Any], Adapters | None]:
    """Parameters and adapters with which `forward` computes a softly masked model; differentiable in the masks.

    The output of a unit is multiplied by its mask, adapters and biases included: q and k each, v, and silu(gate) * up
    by the mask's square, as in ATP's code. With masks of 0 and 1 this is the model without the pruned units.

    Args:
        params: the parameter tree.
        adapters: adapters, or None.
        soft_masks: kind -> float32 `[L,n]`.
        spec: the model.
        space: the space that the kinds belong to.

    Returns:
        The new tree and adapters; arrays that no mask scales are unchanged.
    """
    layers = dict(params["layers"])
    lora_b = {} if adapters is None else dict(adapters.lora_b)
    for kind, units in units_of(spec, space).items():
        for name, power in units.scaled.items():
            factor = soft_masks[kind][:, units.rows[name]] ** power
            layers[name] = _scaled(layers[name], factor[..., None])
            if name in spec.biases:
                layers[f"{name}_bias"] = _scaled(layers[f"{name}_bias"], factor)
            if name in lora_b:
                lora_b[name] = _scaled(lora_b[name], factor[..., None])
    softened = None if adapters is None else dataclasses.replace(adapters, lora_b=lora_b)
    return {**params, "layers": layers}, softened


def _scaled(array: Array, factor: Array) -> Array:
    return (array * factor).astype(array.dtype)
