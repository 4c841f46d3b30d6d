"""The arrays of all blocks, stacked for `lax.scan`, and the forms that a CPU slices fastest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.lora import Adapters, check_fit

Array = jax.Array


@struct.dataclass
class Layer:
    """One block's arrays: weights `[O,I]`, norms and biases, adapters and masks by linear name (any may be absent).

    A mask is bool `[O,I]` or packed uint8 `[O,ceil(I/8)]`, see `efx_jax.masks`.
    """

    weights: dict[str, Array]
    lora_a: dict[str, Array]
    lora_b: dict[str, Array]
    masks: dict[str, Array]


def stack_layers(params: Mapping[str, Any], adapters: Adapters | None, masks: Mapping[str, Array] | None) -> Layer:
    """All blocks as one `Layer` whose arrays have a leading axis L.

    Raises:
        InputError: an adapter or mask for a linear that the model does not have, or a mask of another shape.
    """
    check_fit(params["layers"], adapters, masks)
    return Layer(
        weights=dict(params["layers"]),
        lora_a={} if adapters is None else adapters.lora_a,
        lora_b={} if adapters is None else adapters.lora_b,
        masks={} if masks is None else dict(masks),
    )


def to_bits(array: Array) -> Array:
    """An array that gets no gradient, in the form that is sliced, gathered and updated fastest; see `from_bits`.

    XLA's CPU backend moves 16-bit floats through float32: for a slice it converts the whole array, then the slice
    back, which costs ten times the slice and twice the memory. It does not convert the same bits as integers.
    """
    if _moved_by_float32(array):
        return jax.lax.bitcast_convert_type(array, jnp.uint16)
    return jax.lax.stop_gradient(array)


def _moved_by_float32(array: Array) -> bool:
    return jax.default_backend() == "cpu" and array.dtype.itemsize == 2


def from_bits(array: Array, dtype: Any) -> Array:
    """The inverse of `to_bits`: numbers of the given dtype again."""
    return jax.lax.bitcast_convert_type(array, dtype) if array.dtype == jnp.uint16 else array


def freeze(layers: Layer) -> tuple[Layer, dict[str, Array]]:
    """Splits blocks that get no gradient into what a scan slices cheaply, and (on a CPU) 16-bit weights.

    `thaw` slices the latter inside the loop.
    """
    weights = {name: jax.lax.stop_gradient(weight) for name, weight in layers.weights.items()}
    aside = {name: weight for name, weight in weights.items() if _moved_by_float32(weight)}
    others = {name: weight for name, weight in weights.items() if name not in aside}
    return dataclasses.replace(layers, weights=others), aside


def thaw(layer: Layer, aside: Mapping[str, Array], index: Array | int) -> Layer:
    """Block `index` with the weights that `freeze` set aside; for use inside the scan."""
    if not aside:
        return layer
    # Without the barrier XLA would move the conversion to float32 out of the loop and convert all blocks at once.
    index, aside = jax.lax.optimization_barrier((index, dict(aside)))
    found = {name: jax.lax.dynamic_index_in_dim(weights, index, keepdims=False) for name, weights in aside.items()}
    return dataclasses.replace(layer, weights=layer.weights | found)
