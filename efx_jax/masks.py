"""Masks as bits: eight entries of a row in one byte, so that a mask takes an eighth of a byte per weight.

The model, `efx_jax.lora` and events take masks as bool `[...,O,I]` or packed as uint8 `[...,O,ceil(I/8)]`; True = kept.
Input 8 j + b is bit b of byte j, the lowest bit first (as numpy's `packbits(bitorder="little")`). Functions for single
matrices (`efx_jax.pruning.recovery`, `swaps`, `sparsegpt`) take bool.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.errors import InputError

Array = jax.Array


def pack_mask(mask: Array) -> Array:
    """bool `[...,I]` -> uint8 `[...,ceil(I/8)]`; the bits beyond I are 0."""
    bits = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 8)])
    bits = bits.reshape(*mask.shape[:-1], -1, 8).astype(jnp.uint8)
    return jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)


def unpack_mask(mask: Array, in_dim: int) -> Array:
    """The mask as bool `[...,I]`; one that is already bool is returned unchanged.

    Raises:
        InputError: neither bool nor packed, such as a mask of 0 and 1 in another dtype.
    """
    check_mask(mask, in_dim)
    if mask.dtype == jnp.bool_:
        return mask
    bits = (mask[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return bits.reshape(*mask.shape[:-1], -1)[..., :in_dim].astype(bool)


def check_mask(mask: Array, in_dim: int) -> None:
    """Refuses what is neither a bool mask `[...,in_dim]` nor a packed one.

    Raises:
        InputError: it is neither.
    """
    widths = {"bool": in_dim, "uint8": packed_shape((in_dim,))[0]}
    if widths.get(mask.dtype.name) != mask.shape[-1]:
        raise InputError(
            f"mask: expected bool [...,{in_dim}], or the bits of pack_mask, uint8 [...,{widths['uint8']}]; found "
            f"{mask.dtype.name} [...,{mask.shape[-1]}]"
        )


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed mask of a weight `[...,O,I]`."""
    return (*shape[:-1], -(-shape[-1] // 8))


def mask_shapes(weights: Mapping[str, Any], names: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the packed masks of some of `weights` (arrays or `ShapeDtypeStruct`s `[...,O,I]`)."""
    return {name: jax.ShapeDtypeStruct(packed_shape(weights[name].shape), jnp.uint8) for name in names}


@jax.jit
def count_kept(mask: Array) -> Array:
    """Entries kept by a mask `[L,O,I]` or `[L,O,ceil(I/8)]`, by layer: int32 `[L]` (their sum may overflow int32)."""
    kept = mask if mask.dtype == jnp.bool_ else jax.lax.population_count(mask)
    return jnp.sum(kept, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)
