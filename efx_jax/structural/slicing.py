"""From masks of units to a smaller model: what can be cut out is cut out, the rest becomes zeros.

A Hugging Face folder has one MLP width, one number of heads and one head dimension for all layers. Units of `hidden`
and `heads` are cut out; layers that keep fewer than the largest are padded with zeros. Head dimensions cannot be cut,
since one `head_dim` serves q, k, v and o and sets the frequencies of RoPE; they become zeros.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec, linear_shapes, param_shapes
from efx_jax.structural.units import Space, Units, unit_weights, units_of

Array = jax.Array


class Promise(NamedTuple):
    """Parameters of the original model, of what the masks keep, and of the file: `written - kept` are padding."""

    original: int
    kept: int
    written: int


def settle_masks(logits: Mapping[str, Array], spec: ModelSpec, space: Space, ratio: float) -> dict[str, np.ndarray]:
    """The final masks: of each kind the units with the highest logits, as many as meet the target without noise.

    Under "paper" all units compete and the lowest logits go until at least `ratio` of the weights are gone. Under
    "sliceable" every layer keeps equally many of a kind, so that no padding is needed: the number of heads allowed by
    `admissible_heads` that is closest to what that competition leaves on average, and as many hidden units as fit.

    Args:
        logits: kind -> `[L,n]`, see `generator.unit_logits`.
        spec: the model.
        space: the space that the kinds belong to.
        ratio: share of the weights of the seven linears to remove, in [0, 1).

    Returns:
        kind -> bool `[L,n]`. Of equal logits the lower index stays.

    Raises:
        InputError: a ratio out of range, or too high for every layer to keep one head and one hidden unit.
    """
    if not 0.0 <= ratio < 1.0:
        raise InputError(f"ratio: expected a value in [0, 1), found {ratio}; 0 keeps every unit")
    kinds = units_of(spec, space)
    values = {kind: np.asarray(logits[kind], np.float32) for kind in kinds}
    masks = _highest(values, {kind: unit_weights(units, spec) for kind, units in kinds.items()}, ratio)
    if space == "paper":
        return masks
    wanted = float(masks["heads"].sum(axis=1).mean())
    allowed = sorted(admissible_heads(spec), key=lambda count: (abs(count - wanted), count))
    total = sum(math.prod(shape) for shape in linear_shapes(spec).values())
    budget = math.floor((1.0 - ratio) * total + 1e-6)
    for heads in allowed:
        hidden = (budget - heads * unit_weights(kinds["heads"], spec)) // unit_weights(kinds["hidden"], spec)
        if hidden >= 1:
            counts = {"heads": heads, "hidden": min(hidden, spec.intermediate_size)}
            return {kind: _top(values[kind], counts[kind]) for kind in kinds}
    raise InputError(f"ratio: {ratio} leaves no layer one key/value head and one hidden unit; lower it")


def admissible_heads(spec: ModelSpec) -> list[int]:
    """Numbers of key/value heads, up to K, that a folder of this model type can have.

    transformers refuses a LLaMA whose `hidden_size` is not a multiple of `num_attention_heads`, even with a `head_dim`.
    """
    group = spec.num_heads // spec.num_kv_heads
    counts = range(1, spec.num_kv_heads + 1)
    if spec.model_type != "llama":
        return list(counts)
    return [n for n in counts if spec.hidden_size % (n * group) == 0 or n == spec.num_kv_heads]


def sliced_spec(spec: ModelSpec, unit_masks: Mapping[str, Any]) -> ModelSpec:
    """The shape of the smaller model: for each kind that can be cut, as many units as the fullest layer keeps."""
    hidden = max(1, int(_most(unit_masks["hidden"])))
    if "heads" not in unit_masks:
        return dataclasses.replace(spec, intermediate_size=hidden)
    kv_heads = min(n for n in admissible_heads(spec) if n >= _most(unit_masks["heads"]))
    heads = kv_heads * (spec.num_heads // spec.num_kv_heads)
    return dataclasses.replace(spec, intermediate_size=hidden, num_heads=heads, num_kv_heads=kv_heads)


def slice_model(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    unit_masks: Mapping[str, Any],
    spec: ModelSpec,
    space: Space,
) -> tuple[dict[str, Any], Adapters | None, ModelSpec]:
    """Cuts the pruned units out of the weights, the biases and the adapters.

    The result computes what the masked model does (`mask_forward="exact"`, biases as in
    `units.without_pruned_biases`), also after `lora.merge`.

    Args:
        params: the parameter tree.
        adapters: adapters, or None.
        unit_masks: kind -> bool `[L,n]`.
        spec: the model.
        space: the space that the kinds belong to.

    Returns:
        The smaller tree, adapters and spec; kept units in their old order, dtypes as they were.
    """
    small = sliced_spec(spec, unit_masks)
    layers = dict(params["layers"])
    lora_a = {} if adapters is None else dict(adapters.lora_a)
    lora_b = {} if adapters is None else dict(adapters.lora_b)
    widths = {"heads": small.num_kv_heads, "hidden": small.intermediate_size}
    for kind, units in units_of(spec, space).items():
        mask = np.asarray(unit_masks[kind], bool)
        width = widths.get(kind, units.count)
        for name, rows in units.rows.items():
            layers[name] = _cut(layers[name], 1, rows, mask, width)
            if name in spec.biases:
                layers[f"{name}_bias"] = _cut(layers[f"{name}_bias"], 1, rows, mask, width)
            if name in lora_b:
                lora_b[name] = _cut(lora_b[name], 1, rows, mask, width)
        for name, columns in units.columns.items():
            layers[name] = _cut(layers[name], 2, columns, mask, width)
            if name in lora_a:
                lora_a[name] = _cut(lora_a[name], 2, columns, mask, width)
    sliced = None if adapters is None else dataclasses.replace(adapters, lora_a=lora_a, lora_b=lora_b)
    return {**params, "layers": layers}, sliced, small


def parameter_count(spec: ModelSpec) -> int:
    """Parameters in the file of a model: every leaf of `param_shapes`."""
    shapes = jax.tree.leaves(param_shapes(spec), is_leaf=lambda leaf: isinstance(leaf, tuple))
    return sum(math.prod(shape) for shape in shapes)


def promise(unit_masks: Mapping[str, Any], spec: ModelSpec, space: Space) -> Promise:
    """How many parameters the masks keep and how many `slice_model` leaves, biases included."""
    original = parameter_count(spec)
    removed = sum(
        int(np.sum(~np.asarray(unit_masks[kind], bool))) * (unit_weights(units, spec) + _unit_biases(units, spec))
        for kind, units in units_of(spec, space).items()
    )
    return Promise(original, original - removed, parameter_count(sliced_spec(spec, unit_masks)))


def _unit_biases(units: Units, spec: ModelSpec) -> int:
    return sum(len(rows) for name, rows in units.rows.items() if name in spec.biases) // units.count


def _most(mask: Any) -> int:
    return int(np.asarray(mask, bool).sum(axis=1).max())


def _highest(values: Mapping[str, np.ndarray], weights: Mapping[str, int], ratio: float) -> dict[str, np.ndarray]:
    """All units compete: the lowest go, one after the other, until `ratio` of all weights are gone."""
    flat = np.concatenate([value.reshape(-1) for value in values.values()])
    sizes = np.concatenate([np.full(value.size, weights[kind], np.int64) for kind, value in values.items()])
    # Of equal values the last goes first.
    order = np.lexsort((-np.arange(flat.size), flat))
    gone_before = np.cumsum(sizes[order]) - sizes[order]
    kept = np.ones(flat.size, bool)
    kept[order] = gone_before >= ratio * sizes.sum() - 1e-6
    ends = np.cumsum([value.size for value in values.values()])[:-1]
    parts = np.split(kept, ends)
    return {kind: part.reshape(value.shape) for (kind, value), part in zip(values.items(), parts, strict=True)}


def _top(values: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` highest of each row of `[L,n]`."""
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, np.argsort(-values, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask


def _cut(array: Array, axis: int, lines: np.ndarray, mask: np.ndarray, width: int) -> Array:
    """Keeps `width` units of every layer along an axis, pruned ones as zeros.

    Args:
        array: `[L,...]`.
        axis: 1 or 2, the axis of the lines.
        lines: int `[lines]`, the unit of each.
        mask: bool `[L,n]`.
        width: units to keep, at least as many as any layer's mask.
    """
    keep = mask[:, lines].reshape(len(mask), *(1,) * (axis - 1), len(lines), *(1,) * (array.ndim - axis - 1))
    zeroed = jnp.where(keep, array, jnp.zeros((), array.dtype))
    if width == mask.shape[1]:
        return zeroed
    # Kept units first, then pruned ones, which are zeros by now and serve as padding.
    order = np.argsort(~mask, axis=1, kind="stable")[:, :width]
    members = np.argsort(lines, kind="stable").reshape(mask.shape[1], -1)
    chosen = members[order].reshape(len(mask), -1)
    return jax.vmap(lambda layer, index: jnp.take(layer, index, axis=axis - 1))(zeroed, jnp.asarray(chosen))
