"""A prune event inside a run: calibrate, prune, and tell the optimizer what has moved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from efx_jax.config import Config
from efx_jax.pruning.event import needs_gram, prune_event
from efx_jax.pruning.sequential import prune_event_sequential
from efx_jax.pruning.statistics import collect_statistics
from efx_jax.training.prepare import Prepared, calibration
from efx_jax.training.schedule import Event
from efx_jax.training.state import RunState, restart_adam


def prune_run(config: Config, prepared: Prepared, state: RunState, event: Event) -> RunState:
    """The state after an event on the run's calibration rows; the last event may be a plain one."""
    prune = dataclasses.replace(config.prune, sparsity=event.sparsity)
    if event.last and prune.plain_last_event:
        prune = dataclasses.replace(prune, recovery="none", ema=1.0)
    adapters, masks = state.train.adapters, state.masks or None
    batches = calibration(config, prepared)
    dtype = config.model.compute_dtype
    if prune.sequential:
        params, new_adapters, new_masks, prune_state = prune_event_sequential(
            state.params, adapters, masks, batches, state.prune, prepared.spec, prune, compute_dtype=dtype
        )
    else:
        stats = collect_statistics(
            state.params,
            batches,
            prepared.spec,
            adapters,
            masks,
            needs_gram(prune),
            mask_forward=prune.mask_forward,
            compute_dtype=dtype,
        )
        params, new_adapters, new_masks, prune_state = prune_event(
            state.params, adapters, masks, stats, state.prune, prepared.spec, prune
        )
    assert new_adapters is not None
    opt_state = state.train.opt_state
    if prune.recovery == "admm":
        opt_state = restart_adam(opt_state)
    train = dataclasses.replace(state.train, adapters=new_adapters, opt_state=opt_state)
    # Waited for here, so that the time of an event is not counted as that of whatever comes next.
    return jax.block_until_ready(RunState(train=train, params=params, masks=new_masks, prune=prune_state))


def mask_sparsity(masks: dict[str, jax.Array]) -> float:
    """Share of pruned entries among the masked matrices."""
    if not masks:
        return 0.0
    # Counted by layer: all layers of a 70B model's matrix together overflow an int32.
    kept = sum(int(n) for mask in masks.values() for n in np.asarray(jnp.sum(mask, axis=(1, 2), dtype=jnp.int32)))
    return 1.0 - kept / sum(mask.size for mask in masks.values())
