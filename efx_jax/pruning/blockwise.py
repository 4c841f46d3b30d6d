"""The prune event with calibration block by block: only one block's statistics, Grams included, exist at a time.

The calibration batches stream through the model: between blocks only their hidden states are kept. With
`config.sequential` every block sees the outputs of the pruned blocks before it (as in Wanda's code), without it those
of the model before the event. With `config.dense_path` the model before the event runs alongside.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efx_jax.config import PruneConfig
from efx_jax.config_event import needs_gram
from efx_jax.lora import Adapters
from efx_jax.model.attention import Implementation
from efx_jax.model.decoder import LinearOptions, attend_within, block, embed_batch
from efx_jax.model.layers import rope_tables
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer
from efx_jax.pruning.average import PruneState
from efx_jax.pruning.budget import budget_statistics
from efx_jax.pruning.event import Block, assemble, block_before, prune_one, stack_blocks
from efx_jax.pruning.event_plan import EventPlan, plan_event
from efx_jax.pruning.statistics import (
    Statistics,
    add_up,
    block_statistics,
    real_tokens,
    require_tokens,
    tokens_and_lengths,
)

Array = jax.Array


def prune_event_blockwise(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    batches: Iterable[Mapping[str, Any]],
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
    *,
    compute_dtype: Any = None,
    attention_path: Implementation = "xla",
    importance: Mapping[str, Array] | None = None,
    packed: bool = False,
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    """As `prune_event`, but calibrated block by block on `batches`.

    Args:
        batches: as for `collect_statistics`; their hidden states are kept between blocks. Budgets other than the
            uniform one first take a pass over the whole model.
        compute_dtype: dtype of the matmul operands of the calibration passes.
        attention_path: see `efx_jax.model.attention.choose_attention`.

    The other arguments, returns and errors are those of `prune_event`.
    """
    batches = list(batches)
    stats = budget_statistics(params, adapters, masks, batches, spec, config, compute_dtype, attention_path)
    plan = plan_event(params, adapters, masks, state, spec, config, stats, importance)
    blocks = prune_blocks(plan, params, batches, compute_dtype, attention_path)
    return assemble(params, adapters, plan.state, stack_blocks(blocks, spec.num_layers), packed)


def prune_blocks(
    plan: EventPlan,
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    compute_dtype: Any,
    attention_path: Implementation = "xla",
    done: Iterable[Block] = (),
) -> Iterator[Block]:
    """Every block after the event, in order.

    Args:
        plan: the checked event.
        params: the parameter tree before it.
        batches: calibration batches.
        compute_dtype: dtype of the matmul operands of the calibration passes.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        done: the first blocks as an interrupted event left them, taken one by one; they are not pruned again.

    Raises:
        InputError: no real token.
    """
    spec, config = plan.spec, plan.config
    rows = []
    for batch in batches:
        tokens, lengths = tokens_and_lengths(batch, spec.vocab_size)
        x = embed_batch(params, tokens)
        rows.append(_Rows(x, x if config.dense_path else None, real_tokens(tokens, lengths)))
    require_tokens(sum(jnp.sum(row.real) for row in rows))
    options = LinearOptions(scale=plan.scale, mask_forward=config.mask_forward, compute_dtype=compute_dtype)
    # As it will be shipped: always through the exact mask.
    shipped = dataclasses.replace(options, mask_forward="exact")
    observe = functools.partial(
        observe_block,
        spec=spec,
        options=options,
        attention_path=attention_path,
        gram=needs_gram(config),
        moves_on=not config.sequential,
    )
    output = functools.partial(block_output, spec=spec, attention_path=attention_path)
    finished = iter(done)
    for index in range(spec.num_layers):
        layer, memory = block_before(plan, index)
        pruned = next(finished, None)
        if pruned is None:
            pruned = prune_one(plan, index, layer, _observe(rows, layer, observe), memory)
        else:
            _pass_by(rows, layer, functools.partial(output, options=options), config)
        yield pruned
        if config.sequential and index + 1 < spec.num_layers:
            after = dataclasses.replace(pruned[0], weights=layer.weights | pruned[0].weights)
            for row in rows:
                row.x = output(row.x, after, options=shipped)


@dataclasses.dataclass(eq=False)
class _Rows:
    """One calibration batch: hidden states `[B,T,D]` entering the next block, now and in the model before the event.

    These are the largest arrays of an event, so each replaces the one before it. `dense` is None without `dense_path`.
    `real`: float32 `[B,T]`, 1 for real tokens.
    """

    x: Array
    dense: Array | None
    real: Array


def _observe(
    rows: list[_Rows], layer: Layer, observe: Callable[..., tuple[Array | None, Array | None, Statistics]]
) -> Statistics:
    """A block's statistics. The rows advance past the old block; under `sequential` they wait for the pruned one."""

    def seen() -> Iterator[Statistics]:
        for row in rows:
            output, row.dense, stats = observe(row.x, row.dense, row.real, layer)
            row.x = row.x if output is None else output
            yield stats

    total: Statistics = add_up(seen())
    return total


def _pass_by(rows: list[_Rows], layer: Layer, output: Callable[..., Array], config: PruneConfig) -> None:
    """Advances the rows past a block that an earlier attempt has already pruned."""
    for row in rows:
        if config.dense_path:
            row.dense = output(row.dense, layer)
        elif not config.sequential:
            row.x = output(row.x, layer)


@functools.partial(jax.jit, static_argnames=("spec", "attention_path", "gram", "moves_on"))
def observe_block(
    x: Array,
    dense: Array | None,
    real: Array,
    layer: Layer,
    spec: ModelSpec,
    options: LinearOptions,
    attention_path: Implementation,
    *,
    gram: bool,
    moves_on: bool,
) -> tuple[Array | None, Array | None, Statistics]:
    """One block's outputs and statistics on the hidden states `[B,T,D]` that reach it.

    Args:
        x: hidden states.
        dense: those behind the blocks as they were before the event, for `Statistics.cross`, or None.
        real: float32 `[B,T]`, 1 for real tokens.
        layer: the block before the event.
        spec: the model.
        options: how its linears compute.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        gram: sum Grams too.
        moves_on: whether to return the output for `x`: under `sequential` the pruned block's output is used instead.

    Returns:
        (output for x or None, output for dense or None, statistics).
    """
    rope, attend = _rope(x, spec), attend_within(None, attention_path)
    moved, taps, _ = block(x, layer, spec, options, rope, attend)
    output = moved if moves_on else None
    if dense is None:
        return output, None, block_statistics(taps, real, gram, None, options.compute_dtype)
    dense_output, dense_taps, _ = block(dense, layer, spec, options, rope, attend)
    return output, dense_output, block_statistics(taps, real, gram, dense_taps, options.compute_dtype)


@functools.partial(jax.jit, static_argnames=("spec", "attention_path"))
def block_output(
    x: Array, layer: Layer, spec: ModelSpec, options: LinearOptions, attention_path: Implementation
) -> Array:
    """One block's output `[B,T,D]`; for the arguments see `observe_block`."""
    return block(x, layer, spec, options, _rope(x, spec), attend_within(None, attention_path))[0]


def _rope(x: Array, spec: ModelSpec) -> tuple[Array, Array]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return rope_tables(spec.rope, spec.head_dim, positions)
