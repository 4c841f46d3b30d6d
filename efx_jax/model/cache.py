"""The key/value cache of the tokens so far, and the decoder's blocks on new tokens, which read and extend it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.model.attention import attention, masked_attention
from efx_jax.model.decoder import LinearOptions, Params, block
from efx_jax.model.layers import rope_tables
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer, from_bits, thaw, to_bits

Array = jax.Array


@struct.dataclass
class KVCache:
    """Rotated keys `[L,B,K,H,S]` and values `[L,B,K,S,H]` of all layers, in the form that `to_bits` gives.

    The first T slots are those of the prompts, padding included; every further token takes the same slot in all rows.
    """

    keys: Array
    values: Array


def empty_cache(params: Params, batch: int, slots: int, spec: ModelSpec, compute_dtype: str | None) -> KVCache:
    """Zeros for B rows of S slots, in `compute_dtype`, or if that is None in the dtype of the weights."""
    dtype = params["layers"]["q_proj"].dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    heads, width = (spec.num_layers, batch, spec.num_kv_heads), spec.head_dim
    return KVCache(
        keys=to_bits(jnp.zeros((*heads, width, slots), dtype)), values=to_bits(jnp.zeros((*heads, slots, width), dtype))
    )


def extend(
    x: Array,
    layers: Layer,
    aside: Mapping[str, Array],
    positions: Array,
    cache: KVCache,
    spec: ModelSpec,
    options: LinearOptions,
    slot: Array,
    visible: Array | None,
) -> tuple[Array, KVCache]:
    """Runs all blocks on new tokens and adds their keys and values to the cache.

    Args:
        x: residual stream of the new tokens `[B,T,D]`.
        layers: stacked blocks, from `freeze`.
        aside: what `freeze` put aside.
        positions: int `[B,T]`.
        cache: keys and values so far.
        spec: the model.
        options: how the linears are computed.
        slot: the slot of the first of the T tokens.
        visible: bool `[B,T,S]`: the slots that a token sees; None: the tokens are the prompts, with causal attention.
    """
    rope = rope_tables(spec.rope, spec.head_dim, positions)

    def body(carry: tuple[Array, KVCache], scanned: tuple[Layer, Array]) -> tuple[tuple[Array, KVCache], None]:
        x, cache = carry
        layer, index = scanned

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            keys, values = to_bits(k.transpose(0, 2, 3, 1)), to_bits(v.transpose(0, 2, 1, 3))
            written = KVCache(
                keys=jax.lax.dynamic_update_slice(cache.keys, keys[None], (index, 0, 0, 0, slot)),
                values=jax.lax.dynamic_update_slice(cache.values, values[None], (index, 0, 0, slot, 0)),
            )
            if visible is None:
                return attention(q, k, v), written
            seen_keys, seen_values = (from_bits(slots[index], k.dtype) for slots in (written.keys, written.values))
            return masked_attention(q, seen_keys, seen_values, visible), written

        x, _, cache = block(x, thaw(layer, aside, index), spec, options, rope, attend)
        return (x, cache), None

    (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, jnp.arange(spec.num_layers)))
    return x, cache
