"""Decoding of a ragged batch with a key/value cache, greedy or sampled, as one pure function."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.einsum import contract
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.cache import KVCache, empty_cache, extend
from efx_jax.model.decoder import LinearOptions, Params, embed, head_weight
from efx_jax.model.layers import rms_norm
from efx_jax.model.sampling import Sampling, draw, most_likely
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer, freeze, from_bits, stack_layers, to_bits
from efx_jax.parallel.partition import constrain, split_over

Array = jax.Array
Padding = Literal["right", "left"]
# Long answers end at different times: the batch is halved, down to `_NARROWEST` rows, whenever half of it has stopped.
# Each width is compiled separately, which does not pay off for short answers. Where a mesh splits the rows, they all
# stay: the unfinished rows lie on any of the devices, and each of them would have to hold all of these rows' caches.
_LONG_ANSWER = 128
_NARROWEST = 8


@struct.dataclass
class _Progress:
    """Tokens chosen so far `output [B,M]`, their number `count`, and the state of the b active rows.

    `rows [b]` are their indices in `output`, `last [b]` their last tokens, `stopped [b]` whether they have ended, `ends
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


@struct.dataclass
class _Model:
    """The weights in the form used for decoding (`freeze`, `to_bits`; `dtype` is the embeddings') and the options."""

    layers: Layer
    aside: dict[str, Array]
    table: dict[str, Array]
    norm: Array
    head: Array
    spec: ModelSpec = struct.field(pytree_node=False)
    options: LinearOptions = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)


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
    """Generates token by token until every row has stopped or `max_new_tokens` are chosen.

    Adapters and masks act as under `exact`, and U is recomputed for every token: merge them first if memory allows.
    Compiled once per shape of `tokens`.

    Args:
        params: parameter tree.
        tokens: prompts, int `[B,T]`, padded on the side that `padding` names; padding may have any value.
        lengths: int `[B]`, the number of tokens of each prompt, at least 1.
        spec: the model, static.
        max_new_tokens: M, static.
        adapters: LoRA adapters, or None.
        masks: name -> bool `[L,O,I]`, True = kept, or None.
        stop_tokens: a row ends with the first of these.
        compute_dtype: dtype of the matmul operands and of the cache; None takes the weights'.
        sampling: how to draw tokens, static; None takes the most likely one.
        key: PRNG key of the draws, or R of them: every prompt is read once and answered R times. Only with `sampling`.
        rows: int `[B]`, the number of each row's random stream; 0, 1, ... by default. A row with the same number,
            key and prompt gets the same tokens whatever batch it is in.
        padding: "right" or "left", static; either gives the same tokens.

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
    model = _prepare(params, adapters, masks, spec, compute_dtype)
    stops = jnp.asarray(stop_tokens, jnp.int32)

    positions = jnp.broadcast_to(jnp.arange(prompt_length), (batch, prompt_length))
    cache = empty_cache(params, batch, prompt_length + max_new_tokens, spec, compute_dtype)
    hidden, cache = _advance(model, cache, tokens, positions, jnp.int32(0), None)
    last_hidden = jnp.tile(hidden[jnp.arange(batch), lengths - 1], (runs, 1))
    first = _choose(model, last_hidden, jnp.int32(0), draws, sampling)
    progress = _Progress(
        output=jnp.full((runs * batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first),
        count=jnp.int32(1),
        rows=jnp.arange(runs * batch),
        last=first,
        stopped=jnp.isin(first, stops),
        ends=jnp.tile(lengths - 1, runs),
        draws=draws,
        cache=jax.tree.map(lambda slots: jnp.tile(slots, (1, runs, 1, 1, 1)), cache),
    )
    next_token = functools.partial(_next_token, model, prompt_length, stops, sampling)
    for width, fewest in _stages(runs * batch, max_new_tokens):
        progress = jax.lax.while_loop(functools.partial(_goes_on, fewest), next_token, _keep_at_work(progress, width))
    # Replicated on every device, so that every host can read the tokens of all rows.
    return constrain(progress.output.reshape(*(() if key is None else key.shape), batch, max_new_tokens))


def _prepare(
    params: Params,
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    spec: ModelSpec,
    compute_dtype: str | None,
) -> _Model:
    layers = stack_layers(params, adapters, masks)
    if adapters is None and compute_dtype is not None:
        layers = _cast_linears(layers, compute_dtype)
    layers, aside = freeze(layers)
    head = head_weight(params)
    return _Model(
        layers=layers,
        aside=aside,
        table={"embed_tokens": to_bits(params["embed_tokens"])},
        norm=params["norm"],
        head=head.astype(head.dtype if compute_dtype is None else compute_dtype),
        spec=spec,
        options=LinearOptions(scale=1.0 if adapters is None else adapters.scale, compute_dtype=compute_dtype),
        dtype=params["embed_tokens"].dtype,
    )


def _advance(
    model: _Model, cache: KVCache, ids: Array, positions: Array, slot: Array, visible: Array | None
) -> tuple[Array, KVCache]:
    """Hidden states after the final norm `[B,T,D]` of new tokens `[B,T]`, see `efx_jax.model.cache.extend`."""
    x = from_bits(embed(model.table, ids), model.dtype)
    x, cache = extend(x, model.layers, model.aside, positions, cache, model.spec, model.options, slot, visible)
    return rms_norm(x, model.norm, model.spec.rms_norm_eps), cache


def _choose(model: _Model, hidden: Array, count: Array, draws: Array | None, sampling: Sampling | None) -> Array:
    """The next token `[B]` after the hidden states `[B,D]`."""
    logits = contract("bd,vd->bv", hidden.astype(model.head.dtype), model.head)
    if sampling is None or draws is None:
        return most_likely(logits)
    return draw(draws, count, logits, sampling)


def _next_token(
    model: _Model, prompt_length: int, stops: Array, sampling: Sampling | None, progress: _Progress
) -> _Progress:
    """One more token for every active row."""
    # The keys of the last chosen token are not in the cache yet.
    positions = (progress.ends + progress.count)[:, None]
    slot = prompt_length + progress.count - 1
    slots = jnp.arange(prompt_length + progress.output.shape[1])
    visible = (slots <= progress.ends[:, None]) | ((slots >= prompt_length) & (slots <= slot))
    hidden, cache = _advance(model, progress.cache, progress.last[:, None], positions, slot, visible[:, None])
    chosen = _choose(model, hidden[:, 0], progress.count, progress.draws, sampling)
    told = jnp.where(progress.stopped, -1, chosen)
    return dataclasses.replace(
        progress,
        output=progress.output.at[progress.rows, progress.count].set(told),
        count=progress.count + 1,
        last=chosen,
        stopped=progress.stopped | jnp.isin(chosen, stops),
        cache=cache,
    )


def _stages(batch: int, max_new_tokens: int) -> list[tuple[int, int]]:
    """For each stage, how many rows are active, and at how few unfinished rows it ends."""
    widths = [batch]
    while max_new_tokens >= _LONG_ANSWER and split_over(batch) == 1 and widths[-1] // 2 >= _NARROWEST:
        widths.append(widths[-1] // 2)
    return list(zip(widths, [*widths[1:], 0], strict=True))


def _goes_on(fewest: int, progress: _Progress) -> Array:
    return (progress.count < progress.output.shape[1]) & (jnp.sum(~progress.stopped) > fewest)


def _keep_at_work(progress: _Progress, width: int) -> _Progress:
    """The progress with `width` rows, including all that have not stopped."""
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
    """The keys `[R*B]` of the rows' random streams, run by run."""
    return jax.vmap(lambda run: jax.vmap(lambda row: jax.random.fold_in(run, row))(rows))(key.ravel()).ravel()


def _to_the_left(tokens: Array, lengths: Array) -> Array:
    """Left-padded rows `[B,T]` turned into right-padded ones."""
    length = tokens.shape[1]
    places = jnp.arange(length) + (length - lengths)[:, None]
    return jnp.take_along_axis(tokens, places % length, axis=1)


def _cast_linears(layers: Layer, dtype: str) -> Layer:
    """The blocks with their linears cast to the matmuls' dtype, so that no step has to cast them again."""
    weights = {name: w.astype(dtype) if name.endswith("_proj") else w for name, w in layers.weights.items()}
    return dataclasses.replace(layers, weights=weights)
