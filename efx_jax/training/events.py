"""A prune event inside a run: calibrate, prune, reset the optimizer if needed; resumes where it was interrupted."""

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from efx_jax.config import Config
from efx_jax.config_event import goes_by_block, moves_base, refits_base, surveyed_rows, without_recovery
from efx_jax.masks import count_kept, packed_shape
from efx_jax.model.attention import Implementation
from efx_jax.model.spec import LINEARS
from efx_jax.parallel.partition import block_on_host
from efx_jax.pruning.blockwise import prune_blocks
from efx_jax.pruning.budget import budget_statistics
from efx_jax.pruning.event import Block, Result, assemble, prune_event, put_block, take_block
from efx_jax.pruning.event_plan import EventPlan, plan_event
from efx_jax.pruning.permutation import find_order, permute
from efx_jax.pruning.statistics import collect_statistics
from efx_jax.training.importance import run_importance
from efx_jax.training.prepare import Prepared, calibration
from efx_jax.training.schedule import Event
from efx_jax.training.state import RunState, restart_adam

# The first block of a saved part, the one after its last, and its folder.
_Part = tuple[int, int, Path]


def prune_run(
    config: Config,
    prepared: Prepared,
    state: RunState,
    event: Event,
    folder: Path,
    attention_path: Implementation,
) -> RunState:
    """The state after an event on the run's calibration rows; the last event may be a plain one.

    Before the first event units may be permuted, see `efx_jax.pruning.permutation`.

    Args:
        config: the settings.
        prepared: model and data.
        state: the state before the event; its `params` are still the base's unless an event has changed them.
        event: which event.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        folder: where a long event saves its finished blocks.
    """
    # Units are permuted once, before the event rather than in it.
    prune = dataclasses.replace(config.prune, sparsity=event.sparsity, permute=False)
    if event.last and prune.plain_last_event:
        prune = dataclasses.replace(without_recovery(prune), ema=1.0)
    elif event.last and not state.masks:
        prune = dataclasses.replace(prune, ema=1.0)
    if config.prune.permute and not state.masks:
        state = _permuted(config, prepared, state, attention_path)
    adapters, masks = state.train.adapters, state.masks or None
    asked = dataclasses.replace(config, prune=dataclasses.replace(config.prune, ema=prune.ema))
    importance, stats = run_importance(asked, prepared, state, event, attention_path)
    batches = calibration(config, prepared)
    spec, dtype = prepared.spec, config.model.compute_dtype
    if goes_by_block(prune):
        if stats is None:
            surveyed = calibration(config, prepared, surveyed_rows(prune))
            stats = budget_statistics(state.params, adapters, masks, surveyed, spec, prune, dtype, attention_path)
        plan = plan_event(state.params, adapters, masks, state.prune, spec, prune, stats, importance)
        result = _resumable(plan, state.params, batches, dtype, attention_path, folder)
        outcome = assemble(state.params, adapters, plan.state, result, packed=True)
    else:
        stats = collect_statistics(
            state.params,
            batches,
            spec,
            adapters,
            masks,
            mask_forward=prune.mask_forward,
            compute_dtype=dtype,
            attention_path=attention_path,
        )
        outcome = prune_event(
            state.params, adapters, masks, stats, state.prune, spec, prune, importance=importance, packed=True
        )
    params, new_adapters, new_masks, prune_state = outcome
    assert new_adapters is not None
    opt_state = state.train.opt_state
    if refits_base(prune) or prune.pbs_rounds:
        opt_state = restart_adam(opt_state)
    train = dataclasses.replace(state.train, adapters=new_adapters, opt_state=opt_state)
    # Block here, so that the event's time is not charged to whatever comes next.
    return jax.block_until_ready(RunState(train=train, params=params, masks=new_masks, prune=prune_state))


def _permuted(config: Config, prepared: Prepared, state: RunState, attention_path: Implementation) -> RunState:
    """The state with its units in an order that suits N:M; Adam's moments are not permuted: it restarts afterwards."""
    rows = calibration(config, prepared, surveyed_rows(config.prune))
    stats = collect_statistics(
        state.params,
        rows,
        prepared.spec,
        state.train.adapters,
        compute_dtype=config.model.compute_dtype,
        attention_path=attention_path,
    )
    order = find_order(state.params, state.train.adapters, stats, prepared.spec, config.prune)
    params, adapters = permute(state.params, state.train.adapters, order)
    assert adapters is not None
    return dataclasses.replace(state, params=params, train=dataclasses.replace(state.train, adapters=adapters))


def _resumable(
    plan: EventPlan,
    params: Mapping[str, Any],
    batches: Any,
    dtype: str,
    attention_path: Implementation,
    folder: Path,
    save_seconds: float = 60.0,
) -> Result:
    """The event block by block; finished blocks are saved about every `save_seconds` for the next attempt to reuse."""
    parts = _parts(folder)
    blocks = prune_blocks(plan, params, batches, dtype, attention_path, _load(parts, plan))
    saved, saved_at = parts[-1][1] if parts else 0, time.monotonic()
    result: Result | None = None
    for index, block in enumerate(blocks):
        result = put_block(result, block, index, plan.spec.num_layers)
        if index >= saved and jax.process_count() == 1 and time.monotonic() - saved_at > save_seconds:
            _save(folder, saved, index + 1, result)
            saved, saved_at = index + 1, time.monotonic()
    assert result is not None
    return result


def _save(folder: Path, first: int, stop: int, result: Result) -> None:
    """Writes the blocks from `first` up to, but not including, `stop`."""
    layers, snapshots = jax.tree.map(lambda leaf: leaf[first:stop], (result.layers, result.snapshots))
    score = {name: blocks[first:stop] for name, blocks in result.score.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / f"blocks-{first:05d}-{stop:05d}").absolute(), Result(layers, snapshots, score))


def _parts(folder: Path) -> list[_Part]:
    """The saved parts up to the first gap; Orbax's half-written folders have other names."""
    parts: list[_Part] = []
    for path in sorted(folder.glob("blocks-?????-?????")):
        first, stop = map(int, path.name.split("-")[1:])
        if first != (parts[-1][1] if parts else 0):
            break
        parts.append((first, stop, path))
    return parts


def _load(parts: list[_Part], plan: EventPlan) -> Iterator[Block]:
    """The finished blocks of an earlier attempt, in order."""
    for first, stop, path in parts:
        with ocp.StandardCheckpointer() as checkpointer:
            part: Result = checkpointer.restore(path.absolute(), _template(plan, stop - first))
        for index in range(stop - first):
            layer, snapshots = take_block((part.layers, part.snapshots), index)
            yield layer, {"snapshots": snapshots, "score": {name: past[index] for name, past in part.score.items()}}


def forget_blocks(folder: Path, manager: ocp.CheckpointManager) -> None:
    """Removes the finished blocks of an event once `manager` has finished saving its outcome."""
    if folder.exists() and jax.process_index() == 0:
        manager.wait_until_finished()
        shutil.rmtree(folder)


def _template(plan: EventPlan, count: int) -> Result:
    """Shapes, dtypes and shardings of `count` finished blocks."""

    def some(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)

    def some_bits(weight: jax.Array) -> jax.ShapeDtypeStruct:
        shape = (count, *packed_shape(weight.shape[1:]))
        return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=weight.sharding)

    before, weights = plan.stacked, plan.stacked.weights
    layers, snapshots = jax.tree.map(some, (before, plan.state.snapshots))
    moved = {name: layers.weights[name] for name in LINEARS} if moves_base(plan.config) else {}
    masks = layers.masks | {name: some_bits(weights[name]) for name in plan.counts[0]}
    score: Any = {name: (block_on_host(weights[name]),) * count for name in plan.state.score}
    return Result(dataclasses.replace(layers, weights=moved, masks=masks), snapshots, score)


def mask_sparsity(masks: Mapping[str, jax.Array], params: Mapping[str, Any]) -> float:
    """Share of pruned entries among the masked matrices of `params`."""
    if not masks:
        return 0.0
    kept = sum(int(n) for mask in masks.values() for n in np.asarray(count_kept(mask)))
    return 1.0 - kept / sum(params["layers"][name].size for name in masks)
