"""The exported weight, the same bits on every machine: mask * (W + scale * B A), summed in order and rounded once.

Every operation is elementwise, in float64, in NumPy and in a fixed order; there is no matrix product, whose summation
order depends on the library and the processor. A product of two float32 numbers is exact in float64, so it does not
matter either whether a processor fuses it with the addition. `lora.merge` is the same in float32, for any device.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from efx_jax.lora import Adapters
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.bitmask import unpack_bits
from efx_jax.weights.byte_ranges import Part
from efx_jax.weights.params import host_part
from efx_jax.weights.source import DTYPES, TensorSource, leaf_dtype, leaves

# Entries processed at a time: few enough that their float64 sums stay in a processor's L2 cache.
_BLOCK_ENTRIES = 1 << 15


def round_once(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Rounds float64 to float32, bfloat16 or float16: to nearest, ties to even.

    NumPy and ml_dtypes convert to bfloat16 via float32, which rounds twice: 1 + 2^-8 + 2^-40 becomes 1. Here the
    float32 is rounded to odd (if any bits are cut off, the last bit is set), which makes the second rounding correct
    (S. Boldo and G. Melquiond, Emulation of FMA and correctly rounded sums, IEEE Transactions on Computers 57, 2008).

    Args:
        values: float64.
        dtype: dtype of the result.
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    if dtype == np.float32:
        return nearest
    bits = nearest.view(np.uint32)
    inexact = nearest != values
    # One step towards zero where the nearest is larger in magnitude.
    bits -= np.abs(nearest) > np.abs(values)
    bits |= inexact
    with np.errstate(over="ignore"):
        return nearest.astype(dtype)


def merged_rows(
    weight: np.ndarray, lora_a: np.ndarray | None, lora_b: np.ndarray | None, kept: np.ndarray | None, scale: float
) -> np.ndarray:
    """mask * (W + scale * (((b_0 a_0) + b_1 a_1) + ...)), rounded once to the dtype of W.

    Args:
        weight: W `[O,I]`, float32, bfloat16 or float16.
        lora_a: A `[R,I]`, float32 or narrower, or None for a linear without adapter.
        lora_b: B `[O,R]`, or None.
        kept: bool `[O,I]`, or None for all.
        scale: alpha / R.

    Returns:
        `[O,I]` in the dtype of `weight`; +0 where `kept` is False.
    """
    merged = weight
    if lora_a is not None and lora_b is not None:
        rows = max(1, _BLOCK_ENTRIES // max(1, weight.shape[1]))
        a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
        merged = np.empty_like(weight)
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            merged[block] = round_once(_effective(weight[block], a, b[block], scale), weight.dtype)
    return merged if kept is None else np.where(kept, merged, np.zeros((), weight.dtype))


def _effective(weight: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scale: float) -> np.ndarray:
    total = np.zeros(weight.shape)
    term = np.empty_like(total)
    for rank in range(len(lora_a)):
        np.multiply(lora_b[:, rank, None], lora_a[rank], out=term)
        total += term
    total *= scale
    total += weight.astype(np.float64)
    return total


def merged_source(
    base: TensorSource, spec: ModelSpec, adapters: Adapters | None, masks: Mapping[str, Any] | None
) -> TensorSource:
    """A checkpoint with adapters and masks folded in as it is read, by `merged_rows`.

    From sharded arrays a process can read only parts within its own shards, as with `params_source`.

    Args:
        base: W in the dtypes that the merged weights are to have.
        spec: its model.
        adapters: the model's adapters, jax or numpy arrays, or None.
        masks: name -> bool `[L,O,I]` or uint8 `[L,O,ceil(I/8)]`, True = kept, or None.
    """
    lora_a = {} if adapters is None else adapters.lora_a
    lora_b = {} if adapters is None else adapters.lora_b
    scale = 0.0 if adapters is None else float(adapters.scale)
    masks = masks or {}
    places = layer_places(spec)

    def read_part(name: str, part: Part) -> np.ndarray:
        weight = base.read_part(name, part)
        leaf, layer = places.get(name, ("", 0))
        if leaf not in lora_a and leaf not in masks:
            return weight
        rows, columns = part
        a = b = None
        if leaf in lora_a:
            every = slice(0, lora_a[leaf].shape[1])
            a = layer_part(lora_a[leaf], layer, (every, columns), small=True)
            b = layer_part(lora_b[leaf], layer, (rows, every), small=True)
        kept = mask_part(masks[leaf], layer, rows, columns) if leaf in masks else None
        return merged_rows(weight, a, b, kept, scale)

    return dataclasses.replace(base, read_part=read_part)


@functools.cache
def layer_places(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Hugging Face name of every tensor in the layers -> its leaf's name and its layer."""
    return {
        name: (leaf.path[-1], layer) for leaf in leaves(spec) if leaf.stacked for layer, name in enumerate(leaf.names)
    }


def layer_part(stacked: Any, layer: int, part: Part, small: bool = False) -> np.ndarray:
    """A part of one layer of an array `[L,...]`, on the host; `small`: see `host_part`."""
    return host_part(stacked, (slice(layer, layer + 1), *part), small)[0]


def mask_part(mask: Any, layer: int, rows: slice, columns: slice) -> np.ndarray:
    """A part of one layer of a mask (bool `[L,O,I]` or packed) as bool, on the host."""
    if mask.dtype == np.bool_:
        return layer_part(mask, layer, (rows, columns))
    first, last = columns.start // 8, -(-columns.stop // 8)
    bits = layer_part(mask, layer, (rows, slice(first, last)))
    return unpack_bits(bits, columns.stop - 8 * first)[:, columns.start - 8 * first :]


def leaf_dtypes(source: TensorSource, spec: ModelSpec) -> TensorSource:
    """The same checkpoint in the dtypes of its tree: float32 for layers that differ in dtype, see `assemble`."""
    dtypes = dict(source.dtypes)
    for leaf in leaves(spec):
        dtypes |= dict.fromkeys(leaf.names, leaf_dtype(source, leaf))

    def read_part(name: str, part: Part) -> np.ndarray:
        return source.read_part(name, part).astype(DTYPES[dtypes[name]], copy=False)

    return dataclasses.replace(source, dtypes=dtypes, read_part=read_part)
