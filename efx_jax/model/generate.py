"""Decoding of a ragged batch with a key/value cache, greedy or sampled, as one pure function."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.errors import InputError
from efx_jax.linear import contract
from efx_jax.lora import Adapters
from efx_jax.model.attention import attention, masked_attention
from efx_jax.model.decoder import (
    Layer,
    LinearOptions,
    Params,
    block,
    embed,
    freeze,
    from_bits,
    head_weight,
    stack_layers,
    thaw,
    to_bits,
)
from efx_jax.model.layers import rms_norm, rope_tables
from efx_jax.model.sampling import Sampling, draw, most_likely
from efx_jax.model.spec import ModelSpec

Array = jax.Array
Padding = Literal["right", "left"]
# Long answers end at different times: the batch is halved, down to so many rows, whenever half of it has stopped. Each
# width is compiled by itself, which short answers would not pay for.
_LONG_ANSWER = 128
_NARROWEST = 8


@struct.dataclass
class KVCache:
    """Rotated keys `[L,B,K,H,S]` and values `[L,B,K,S,H]` of all layers, by `to_bits`.

    The first T slots are those of the prompts, padding included; every further token takes the same slot in all rows.
    """

    keys: Array
    values: Array


@struct.dataclass
class _Progress:
    """Tokens chosen so far `output [B,M]` and their number; the rest is that of the b rows at work.

    `rows [b]` are their lines in `output`, `last [b]` their last tokens, `stopped [b]` whether they have ended, `ends
    [b]` the positions of their prompts' last tokens, `draws [b]` the keys of their draws, or None.
    """

    output: Array
    count: Array
    rows: Array
    last: Array
    stopped: Array
    ends: Array
    draws: Array | None
    cache: KVCache


@functools.partial(
    jax.jit, static_argnames=("spec", "max_new_tokens", "stop_tokens", "compute_dtype", "sampling", "padding")
)
def generate(
    params: Params,
    tokens: Array,
    lengths: Array,
    spec: ModelSpec,
    max_new_tokens: int,
    adapters: Adapters | None = None,
    masks: Mapping[str, Array] | None = None,
    *,
    stop_tokens: tuple[int, ...] = (),
    compute_dtype: str | None = None,
    sampling: Sampling | None = None,
    key: Array | None = None,
    rows: Array | None = None,
    padding: Padding = "right",
) -> Array:
    """A next token, again and again, until every row has stopped or `max_new_tokens` are chosen.

    Adapters and masks act as under `exact`, and U is formed again for every token: merge them first where memory
    allows. Compiled once per shape of `tokens`.

    Args:
        params: parameter tree.
        tokens: prompts, int `[B,T]`, padded on the side that `padding` names; the value of padding is free.
        lengths: int `[B]`, tokens of each prompt, at least 1.
        spec: the model, static.
        max_new_tokens: M, static.
        adapters: LoRA adapters, or None.
        masks: name -> bool `[L,O,I]`, True = kept, or None.
        stop_tokens: a row ends with the first of these.
        compute_dtype: dtype of the matmul operands and of the cache; None takes the weights'.
        sampling: how to draw tokens, static; None takes the most likely one.
        key: PRNG key of the draws, or R of them: every prompt is read once and answered R times. Only with `sampling`.
        rows: int `[B]`, the number of each row's stream of draws; 0, 1, ... by default. A row with the same number,
            key and prompt gets the same tokens in whatever batch it is.
        padding: "right" or "left", static; the tokens chosen are the same.

    Returns:
        int32 `[B,M]`, or `[R,B,M]` for R keys: the new tokens, the stop token included, then -1.

    Raises:
        InputError: `max_new_tokens` below 1; sampling without a key, or a key without sampling.
    """
    if max_new_tokens < 1:
        raise InputError(f"generate: max_new_tokens must be at least 1, found {max_new_tokens}")
    if (sampling is None) != (key is None):
        raise InputError("generate: expected sampling and key together, found one without the other")
    batch, prompt_length = tokens.shape
    runs = 1 if key is None else key.size
    draws = None if key is None else _row_keys(key, jnp.arange(batch) if rows is None else rows)
    tokens = _to_the_left(tokens, lengths) if padding == "left" else tokens
    layers = stack_layers(params, adapters, masks)
    if adapters is None and compute_dtype is not None:
        layers = _cast_linears(layers, compute_dtype)
    head = head_weight(params)
    head = head.astype(head.dtype if compute_dtype is None else compute_dtype)
    layers, aside = freeze(layers)
    embeddings = params["embed_tokens"]
    table = {"embed_tokens": to_bits(embeddings)}
    options = LinearOptions(scale=1.0 if adapters is None else adapters.scale, compute_dtype=compute_dtype)
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def advance(
        cache: KVCache, ids: Array, positions: Array, slot: Array, visible: Array | None
    ) -> tuple[Array, KVCache]:
        x = from_bits(embed(table, ids), embeddings.dtype)
        x, cache = _extend(x, layers, aside, positions, cache, spec, options, slot, visible)
        return rms_norm(x, params["norm"], spec.rms_norm_eps), cache

    def choose(hidden: Array, count: Array, draws: Array | None) -> Array:
        logits = contract("bd,vd->bv", hidden.astype(head.dtype), head)
        if sampling is None or draws is None:
            return most_likely(logits)
        return draw(draws, count, logits, sampling)

    def step(progress: _Progress) -> _Progress:
        # The last token chosen is the first whose keys are not in the cache yet.
        positions = (progress.ends + progress.count)[:, None]
        slot = prompt_length + progress.count - 1
        visible = (slots <= progress.ends[:, None]) | ((slots >= prompt_length) & (slots <= slot))
        hidden, cache = advance(progress.cache, progress.last[:, None], positions, slot, visible[:, None])
        chosen = choose(hidden[:, 0], progress.count, progress.draws)
        told = jnp.where(progress.stopped, -1, chosen)
        return dataclasses.replace(
            progress,
            output=progress.output.at[progress.rows, progress.count].set(told),
            count=progress.count + 1,
            last=chosen,
            stopped=progress.stopped | jnp.isin(chosen, stops),
            cache=cache,
        )

    slots = jnp.arange(prompt_length + max_new_tokens)
    positions = jnp.broadcast_to(slots[:prompt_length], (batch, prompt_length))
    cache = _empty_cache(params, batch, slots.size, spec, compute_dtype)
    hidden, cache = advance(cache, tokens, positions, jnp.int32(0), None)
    ends = jnp.tile(lengths - 1, runs)
    first = choose(jnp.tile(hidden[jnp.arange(batch), lengths - 1], (runs, 1)), jnp.int32(0), draws)
    progress = _Progress(
        output=jnp.full((runs * batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first),
        count=jnp.int32(1),
        rows=jnp.arange(runs * batch),
        last=first,
        stopped=jnp.isin(first, stops),
        ends=ends,
        draws=draws,
        cache=jax.tree.map(lambda slots: jnp.tile(slots, (1, runs, 1, 1, 1)), cache),
    )
    for width, fewest in _stages(runs * batch, max_new_tokens):
        progress = jax.lax.while_loop(functools.partial(_goes_on, fewest), step, _keep_at_work(progress, width))
    return progress.output.reshape(*(() if key is None else key.shape), batch, max_new_tokens)


def _stages(batch: int, max_new_tokens: int) -> list[tuple[int, int]]:
    """Stage after stage, how many rows are at work, and with how few left it ends."""
    widths = [batch]
    while max_new_tokens >= _LONG_ANSWER and widths[-1] // 2 >= _NARROWEST:
        widths.append(widths[-1] // 2)
    return list(zip(widths, [*widths[1:], 0], strict=True))


def _goes_on(fewest: int, progress: _Progress) -> Array:
    return (progress.count < progress.output.shape[1]) & (jnp.sum(~progress.stopped) > fewest)


def _keep_at_work(progress: _Progress, width: int) -> _Progress:
    """The progress with `width` rows, at least those that have not stopped."""
    if width == progress.rows.size:
        return progress
    chosen = jnp.argsort(progress.stopped, stable=True)[:width]
    return dataclasses.replace(
        progress,
        rows=progress.rows[chosen],
        last=progress.last[chosen],
        stopped=progress.stopped[chosen],
        ends=progress.ends[chosen],
        draws=None if progress.draws is None else progress.draws[chosen],
        cache=jax.tree.map(lambda slots: slots[:, chosen], progress.cache),
    )


def _row_keys(key: Array, rows: Array) -> Array:
    """The keys `[R*B]` of the streams of draws, run by run."""
    return jax.vmap(lambda run: jax.vmap(lambda row: jax.random.fold_in(run, row))(rows))(key.ravel()).ravel()


def _empty_cache(params: Params, batch: int, slots: int, spec: ModelSpec, compute_dtype: str | None) -> KVCache:
    dtype = params["layers"]["q_proj"].dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    heads, width = (spec.num_layers, batch, spec.num_kv_heads), spec.head_dim
    return KVCache(
        keys=to_bits(jnp.zeros((*heads, width, slots), dtype)), values=to_bits(jnp.zeros((*heads, slots, width), dtype))
    )


def _to_the_left(tokens: Array, lengths: Array) -> Array:
    """Left-padded rows `[B,T]` with their padding behind them."""
    length = tokens.shape[1]
    places = jnp.arange(length) + (length - lengths)[:, None]
    return jnp.take_along_axis(tokens, places % length, axis=1)


def _cast_linears(layers: Layer, dtype: str) -> Layer:
    """The blocks with their linears as the matmuls want them, so that no step casts them again."""
    weights = {name: w.astype(dtype) if name.endswith("_proj") else w for name, w in layers.weights.items()}
    return dataclasses.replace(layers, weights=weights)


def _extend(
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
    """All blocks on new tokens, whose keys and values enter the cache.

    Args:
        x: residual stream of the new tokens `[B,T,D]`.
        layers: stacked blocks, from `freeze`.
        aside: what `freeze` put aside.
        positions: int `[B,T]`.
        cache: keys and values so far.
        spec: the model.
        options: how the linears are computed.
        slot: the slot of the first of the T tokens.
        visible: bool `[B,T,S]`: the slots that a token sees; None: the tokens are the prompts, and each sees those
            before it.
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
