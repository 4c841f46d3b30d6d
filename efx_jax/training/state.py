"""What training carries from step to step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from efx_jax.config import Config
from efx_jax.config_event import keeps_scores
from efx_jax.lora import Adapters, init_lora
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import tree_shardings
from efx_jax.pruning.average import PruneState, init_prune_state
from efx_jax.structural.generator import Generator

Array = jax.Array


@struct.dataclass
class TrainState:
    """Adapters and their optimizer state after `step` updates, without the base model and the masks."""

    step: Array
    adapters: Adapters
    opt_state: optax.OptState


@struct.dataclass
class GeneratorState:
    """ATP's generator and its optimizer state after `step` updates."""

    step: Array
    generator: Generator
    opt_state: optax.OptState


@struct.dataclass
class UnitState:
    """ATP's choice of units: the generator that makes it, and `masks`, kind -> bool `[L,n]`, all True until then."""

    generator: GeneratorState
    masks: dict[str, Array]


@struct.dataclass
class RunState:
    """Everything that a checkpoint holds: `masks` is {} before the first event; `params` changes if events rewrite it.

    `units` is None unless the run prunes whole units (ATP); their masks are kept only there.
    """

    train: TrainState
    params: dict[str, Any]
    masks: dict[str, Array]
    prune: PruneState
    units: UnitState | None = None


def init_train_state(adapters: Adapters, tx: optax.GradientTransformation) -> TrainState:
    """Step 0: fresh optimizer moments for the adapters alone."""
    return TrainState(step=jnp.int32(0), adapters=adapters, opt_state=tx.init(trainable(adapters)))


def fresh_state(
    config: Config,
    params: dict[str, Any],
    spec: ModelSpec,
    mesh: Mesh,
    tx: optax.GradientTransformation,
    keys: Sequence[Array],
    events: int,
    start: Adapters | None = None,
) -> RunState:
    """A run at step 0, sharded over the mesh: new adapters or those to start from, no masks.

    Args:
        config: settings of the adapters and of pruning.
        params: the base.
        spec: the model.
        mesh: the devices.
        tx: the optimizer.
        keys: two PRNG keys: one draws A, the other the adapters of later events.
        events: number of prune events, at least 1.
        start: adapters to continue training from; None draws new ones.
    """
    lora, (adapter_key, prune_key) = config.lora, keys
    if start is None:
        adapters = init_lora(adapter_key, params, spec, lora.rank, lora.alpha, lora.targets, lora.rslora)
    else:
        # The first step donates them.
        adapters = jax.tree.map(jnp.copy, start)
    # With one event nothing is averaged, so no score of every weight is kept. (Snapshots are small.)
    averaging = config.prune
    if events == 1 and keeps_scores(averaging):
        averaging = dataclasses.replace(averaging, ema=1.0)
    prune = init_prune_state(params, adapters, averaging, prune_key, events)
    placed = {"train": init_train_state(adapters, tx), "prune": prune}
    placed = jax.device_put(placed, tree_shardings(mesh, placed))
    return RunState(placed["train"], params, {}, placed["prune"])


def trainable(adapters: Adapters) -> dict[str, dict[str, Array]]:
    """The arrays that the optimizer sees."""
    return {"lora_a": adapters.lora_a, "lora_b": adapters.lora_b}


def restart_adam(opt_state: optax.OptState) -> optax.OptState:
    """Adam as before its first update; the learning-rate schedule continues.

    After an event that sets B to zero or recomputes A and B, the moments belong to weights that are gone (the authors'
    code, and with it the preset `official`, keeps them through its merges). They restart for all adapters, even those
    of linears that are not pruned: Adam has a single count. That count restarts too: zero moments under a large count
    are not bias-corrected, and the n-th update after the event is (1 - 0.9^n) / sqrt(1 - 0.999^n) times too large, up
    to 6 times.
    """

    def is_adam(node: object) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def restart(node: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, node) if is_adam(node) else node

    return jax.tree.map(restart, opt_state, is_leaf=is_adam)
