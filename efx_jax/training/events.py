"""A prune event inside a run: calibrate, prune, tell the optimizer what has moved; taken up where it was cut off."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from efx_jax.config import Config
from efx_jax.config_prune import surveyed_rows, without_recovery
from efx_jax.masks import count_kept, packed_shape
from efx_jax.model.attention import Implementation
from efx_jax.model.decoder import Layer
from efx_jax.model.spec import LINEARS
from efx_jax.parallel.partition import constrain_tree, to_host
from efx_jax.pruning.average import Memory, moves_base, refits_base
from efx_jax.pruning.blockwise import prune_blocks
from efx_jax.pruning.budget import budget_statistics
from efx_jax.pruning.event import (
    EventPlan,
    Result,
    assemble,
    block_before,
    needs_gram,
    plan_event,
    prune_event,
    put_block,
)
from efx_jax.pruning.permutation import find_order, permute
from efx_jax.pruning.statistics import collect_statistics
from efx_jax.training.importance import run_importance
from efx_jax.training.prepare import Prepared, calibration
from efx_jax.training.schedule import Event
from efx_jax.training.state import RunState, restart_adam

_Block = tuple[Layer, Memory]


def prune_run(
    config: Config,
    prepared: Prepared,
    state: RunState,
    event: Event,
    folder: Path,
    attention_path: Implementation,
) -> RunState:
    """The state after an event on the run's calibration rows; the last event may be a plain one.

    Before the first event units may change places, see `efx_jax.pruning.permutation`.

    Args:
        config: the settings.
        prepared: model and data.
        state: the state before the event; its `params` are still those of the base where no event has moved them.
        event: which event.
        attention_path: see `efx_jax.model.attention.choose_attention`.
        folder: where a long event leaves the blocks that it has finished.
    """
    # Units change places once, and not in the event itself.
    prune = dataclasses.replace(config.prune, sparsity=event.sparsity, permute=False)
    if event.last and prune.plain_last_event:
        prune = dataclasses.replace(without_recovery(prune), ema=1.0)
    if config.prune.permute and not state.masks:
        state = _permuted(config, prepared, state, attention_path)
    adapters, masks = state.train.adapters, state.masks or None
    importance = run_importance(config, prepared, state, event, attention_path)
    batches = calibration(config, prepared)
    spec, dtype = prepared.spec, config.model.compute_dtype
    if prune.sequential or needs_gram(prune) or state.prune.score:
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
    # Waited for here, so that the time of an event is not counted as that of whatever comes next.
    return jax.block_until_ready(RunState(train=train, params=params, masks=new_masks, prune=prune_state))


def _permuted(config: Config, prepared: Prepared, state: RunState, attention_path: Implementation) -> RunState:
    """The state with its units in an order that suits N:M. (Adam starts again after the event: it has no order.)"""
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
    """The event block by block; what `save_seconds` have brought is saved, and taken up by the next attempt."""
    done = _load(folder, plan)
    result: Result | None = None
    unsaved: list[_Block] = []
    saved_at = time.monotonic()
    for index, block in enumerate(prune_blocks(plan, params, batches, dtype, attention_path, done)):
        result = put_block(result, block, index, plan.spec.num_layers)
        if index < len(done):
            continue
        unsaved.append(block)
        if jax.process_count() == 1 and time.monotonic() - saved_at > save_seconds:
            _save(folder, index + 1 - len(unsaved), jax.block_until_ready(unsaved))
            unsaved, saved_at = [], time.monotonic()
    assert result is not None
    return result


def _save(folder: Path, first: int, blocks: list[_Block]) -> None:
    """Writes some finished blocks, the first of them number `first`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / f"blocks-{first:05d}-{first + len(blocks):05d}").absolute(), blocks)


def _load(folder: Path, plan: EventPlan) -> list[_Block]:
    """The finished blocks of an earlier attempt, in order; Orbax's half-written folders have other names."""
    blocks: list[_Block] = []
    for part in sorted(folder.glob("blocks-?????-?????")):
        _, first, end = part.name.split("-")
        if int(first) != len(blocks):
            break
        template = [_template(plan)] * (int(end) - int(first))
        with ocp.StandardCheckpointer() as checkpointer:
            blocks += checkpointer.restore(part.absolute(), template)
    return [(layer, {**memory, "score": jax.tree.map(to_host, memory["score"])}) for layer, memory in blocks]


def forget_blocks(folder: Path, manager: ocp.CheckpointManager) -> None:
    """Removes the finished blocks of an event whose outcome `manager` saves, as soon as that is whole."""
    if folder.exists() and jax.process_index() == 0:
        manager.wait_until_finished()
        shutil.rmtree(folder)


def _template(plan: EventPlan) -> _Block:
    """Arrays of the shapes, dtypes and places of a finished block."""
    layer, memory = block_before(plan, 0)
    moved = {name: layer.weights[name] for name in LINEARS} if moves_base(plan.config) else {}
    shapes = {name: packed_shape(layer.weights[name].shape) for name in plan.counts[0]}
    masks = layer.masks | {name: jnp.zeros(shape, jnp.uint8) for name, shape in shapes.items()}
    return jax.jit(constrain_tree)((dataclasses.replace(layer, weights=moved, masks=masks), memory))


def mask_sparsity(masks: Mapping[str, jax.Array], params: Mapping[str, Any]) -> float:
    """Share of pruned entries among the masked matrices of `params`."""
    if not masks:
        return 0.0
    kept = sum(int(n) for mask in masks.values() for n in np.asarray(count_kept(mask)))
    return 1.0 - kept / sum(params["layers"][name].size for name in masks)
