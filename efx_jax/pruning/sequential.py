"""The prune event block by block: each block is calibrated on the outputs of the pruned blocks before it."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.config import MaskForward, PruneConfig
from efx_jax.lora import Adapters
from efx_jax.model.decoder import Layer, attend_within, block, embed, stack_layers
from efx_jax.model.layers import rope_tables
from efx_jax.model.spec import ModelSpec
from efx_jax.pruning.average import PruneState, memory_of, prunable
from efx_jax.pruning.event import (
    assemble,
    check_event,
    event_counts,
    needs_gram,
    prune_block,
    without_frozen,
    without_sparsity,
)
from efx_jax.pruning.statistics import (
    Statistics,
    add_statistics,
    block_statistics,
    layer_options,
    real_tokens,
    require_tokens,
    tokens_and_lengths,
)

Array = jax.Array


def prune_event_sequential(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    batches: Iterable[Mapping[str, Any]],
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
    *,
    compute_dtype: Any = None,
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    """As `prune_event`, but every block is calibrated on the outputs of the already pruned blocks before it (Wanda).

    Args:
        batches: as for `collect_statistics`; their hidden states are kept between blocks.
        compute_dtype: dtype of the matmul operands of the calibration passes.

    The other arguments, returns and errors are those of `prune_event`.
    """
    state = check_event(params, adapters, state, config)
    counts = event_counts(params["layers"], prunable(params["layers"], config), config)
    scale = 1.0 if adapters is None else adapters.scale
    static = without_sparsity(config)
    keys = jax.random.split(jax.random.fold_in(state.key, state.event), spec.num_layers)
    stacked, memory = stack_layers(params, adapters, masks), memory_of(state)
    hidden = [
        (embed(params, tokens), real_tokens(tokens, lengths)) for tokens, lengths in map(tokens_and_lengths, batches)
    ]
    require_tokens(sum(jnp.sum(real) for _, real in hidden))
    done = []
    for index in range(spec.num_layers):
        layer, past = jax.tree.map(lambda leaf, i=index: leaf[i], (stacked, memory))
        total: Statistics | None = None
        for x, real in hidden:
            stats = _one_block_statistics(
                x, real, layer, spec, needs_gram(config), scale, config.mask_forward, compute_dtype
            )
            total = stats if total is None else add_statistics(total, stats)
        assert total is not None
        pruned, past = _prune_block(layer, total, past, counts, keys[index], state.event, spec, static, scale)
        done.append((without_frozen(pruned, config), past))
        hidden = [(_block_output(x, pruned, spec, scale, compute_dtype), real) for x, real in hidden]
    layers, memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
    return assemble(params, adapters, layers, memory, state)


_prune_block = functools.partial(jax.jit, static_argnames=("spec", "config", "scale"))(prune_block)


@functools.partial(jax.jit, static_argnames=("spec", "gram", "scale", "mask_forward", "compute_dtype"))
def _one_block_statistics(
    x: Array,
    real: Array,
    layer: Layer,
    spec: ModelSpec,
    gram: bool,
    scale: float,
    mask_forward: MaskForward,
    compute_dtype: Any,
) -> Statistics:
    """Statistics of one block on the hidden states `[B,T,D]` that reach it."""
    options = dataclasses.replace(layer_options(None, mask_forward, compute_dtype), scale=scale)
    _, taps, _ = block(x, layer, spec, options, _rope(x, spec), attend_within(x.shape[1], None))
    return block_statistics(taps, real, gram)


@functools.partial(jax.jit, static_argnames=("spec", "scale", "compute_dtype"))
def _block_output(x: Array, layer: Layer, spec: ModelSpec, scale: float, compute_dtype: Any) -> Array:
    """The block's output as it will be shipped: always through the exact mask."""
    options = dataclasses.replace(layer_options(None, "exact", compute_dtype), scale=scale)
    return block(x, layer, spec, options, _rope(x, spec), attend_within(x.shape[1], None))[0]


def _rope(x: Array, spec: ModelSpec) -> tuple[Array, Array]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return rope_tables(spec.rope, spec.head_dim, positions)
