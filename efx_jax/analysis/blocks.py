"""A model examined block by block on one batch: every block's effective weights and activations, in float32."""

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.evaluation.likelihood import target_log_probabilities
from efx_jax.lora import Adapters
from efx_jax.model.decoder import LinearOptions, attend_within, block, embed_batch, head_weight
from efx_jax.model.layers import rms_norm, rope_tables
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer, freeze, stack_layers, thaw
from efx_jax.pruning.block import effective_weights
from efx_jax.pruning.event import take_block
from efx_jax.pruning.statistics import Statistics, block_statistics, real_tokens

Array = jax.Array


@struct.dataclass
class Model:
    """A model and the batch that it is examined on.

    `layers` holds the stacked base weights and adapters, `tokens` int `[B,T]`, `real` float32 `[B,T]` (1 where a token
    is real), `rope` cos and sin `[B,T,1,H/2]`.
    """

    params: dict[str, Any]
    layers: Layer
    tokens: Array
    real: Array
    rope: tuple[Array, Array]
    spec: ModelSpec = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class BlockView:
    """One block on the batch, float32.

    `weights`: U `[O,I]` of the seven linears, norms and biases. `x` and `mid` `[B,T,D]`: the residual stream before
    attention and before the MLP. `taps`: as returned by `efx_jax.model.decoder.block`. `stats`: sums over real tokens.
    `real` and `rope`: as in `Model`.
    """

    weights: dict[str, Array]
    x: Array
    mid: Array
    taps: dict[str, Array]
    stats: Statistics
    real: Array
    rope: tuple[Array, Array]


def look_at(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    batch: Mapping[str, Any],
    spec: ModelSpec,
) -> Model:
    """A model without masks on one right-padded batch `tokens [B,T]`, `lengths [B]`."""
    tokens = jnp.asarray(batch["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Model(
        params=dict(params),
        layers=stack_layers(params, adapters, None),
        tokens=tokens,
        real=real_tokens(tokens, jnp.asarray(batch["lengths"])),
        rope=rope_tables(spec.rope, spec.head_dim, positions),
        spec=spec,
        scale=1.0 if adapters is None else adapters.scale,
    )


def walk(model: Model, layers: Collection[int]) -> Iterator[tuple[int, BlockView]]:
    """Number and view of some blocks on the batch, in the model's order; one view exists at a time."""
    x = entering(model)
    for index in range(max(layers, default=-1) + 1):
        weights = effective_layer(model, index)
        if index in layers:
            view, x = _view(weights, x, model.real, model.rope, model.spec)
            yield index, view
        else:
            x = run_block(weights, x, model.rope, model.spec)


def entering(model: Model) -> Array:
    """The residual stream before the first block, float32 `[B,T,D]`."""
    return embed_batch(model.params, model.tokens).astype(jnp.float32)


def effective_layer(model: Model, index: int) -> dict[str, Array]:
    """The effective weights of block `index`: U `[O,I]` of the linears, norms and biases, float32."""
    return _effective(model.layers, index, model.scale)


def mean_nll(model: Model, x: Array, first: int) -> float:
    """Mean negative log-likelihood of the next token, in nats, for a residual stream that enters block `first`.

    Args:
        model: the model.
        x: float32 `[b,T,D]`, for the first b rows of the batch.
        first: number of the block; L if x is the output of the last one.
    """
    rows = x.shape[0]
    rope = tuple(table[:rows] for table in model.rope)
    for index in range(first, model.spec.num_layers):
        x = run_block(effective_layer(model, index), x, rope, model.spec)
    final = {"norm": model.params["norm"], "head": head_weight(model.params)}
    return float(_nll(final, x, model.tokens[:rows], model.real[:rows], model.spec.rms_norm_eps))


@functools.partial(jax.jit, static_argnames="spec")
def run_block(weights: Mapping[str, Array], x: Array, rope: tuple[Array, Array], spec: ModelSpec) -> Array:
    """The residual stream `[b,T,D]` after one block with effective weights."""
    return _forward(weights, x, rope, spec)[0]


@functools.partial(jax.jit, static_argnames="scale")
def _effective(layers: Layer, index: Array | int, scale: float) -> dict[str, Array]:
    layers, aside = freeze(layers)
    layer = thaw(take_block(layers, index), aside, index)
    weights = {name: weight.astype(jnp.float32) for name, weight in layer.weights.items()}
    return weights | effective_weights(layer, scale)


@functools.partial(jax.jit, static_argnames="spec")
def _view(
    weights: dict[str, Array], x: Array, real: Array, rope: tuple[Array, Array], spec: ModelSpec
) -> tuple[BlockView, Array]:
    after, taps = _forward(weights, x, rope, spec)
    mid = x + jnp.einsum("bti,oi->bto", taps["o_in"], weights["o_proj"], precision="highest")
    return BlockView(weights, x, mid, taps, block_statistics(taps, real, gram=False), real, rope), after


def _forward(
    weights: Mapping[str, Array], x: Array, rope: tuple[Array, Array], spec: ModelSpec
) -> tuple[Array, dict[str, Array]]:
    layer = Layer(weights=dict(weights), lora_a={}, lora_b={}, masks={})
    with jax.default_matmul_precision("highest"):
        x, taps, _ = block(x, layer, spec, LinearOptions(compute_dtype="float32"), rope, attend_within())
    return x, taps


@functools.partial(jax.jit, static_argnames="eps")
def _nll(final: Mapping[str, Array], x: Array, tokens: Array, real: Array, eps: float) -> Array:
    hidden = rms_norm(x, final["norm"], eps)
    sources = jnp.arange(tokens.shape[1] - 1)
    with jax.default_matmul_precision("highest"):
        scores = target_log_probabilities(hidden, final["head"], sources, tokens[:, 1:], "float32")
    return -jnp.sum(scores * real[:, 1:]) / jnp.sum(real[:, 1:])
