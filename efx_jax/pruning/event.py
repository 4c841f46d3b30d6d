"""One prune event: score -> moving average -> mask -> recovery, block by block with one compiled program.

`prune_event` takes statistics of the whole model, collected in one pass. `efx_jax.pruning.blockwise` collects them
block by block, so that only one block's Grams exist at a time. Both run the same `prune_block`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.config import PruneConfig
from efx_jax.config_event import needs_gram
from efx_jax.config_prune import validate_prune
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.masks import unpack_mask
from efx_jax.model.spec import ModelSpec
from efx_jax.model.stack import Layer
from efx_jax.parallel.partition import constrain_tree, to_device, to_host
from efx_jax.pruning.average import Memory, PruneState
from efx_jax.pruning.block import prune_block
from efx_jax.pruning.event_plan import EventPlan, plan_event
from efx_jax.pruning.statistics import Statistics

Array = jax.Array
# A block after the event, and its part of the moving average.
Block = tuple[Layer, Memory]


def prune_event(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    stats: Statistics,
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
    *,
    importance: Mapping[str, Array] | None = None,
    packed: bool = False,
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    """Draws new masks and repairs the model (paper, Algorithm 1, the body of its epoch loop after training).

    Args:
        params: parameter tree, linears `[L,O,I]`.
        adapters: adapters, or None (then U = W).
        masks: masks in force, or None before the first event.
        stats: `collect_statistics` of the model as it stands; with Grams if `needs_gram`.
        state: the state of the earlier events, or None at the first.
        spec: the model.
        config: score, group, sparsity, recovery and moving average of this event.
        importance: name -> float32 `[L,O]` for "foresight_loss": the first result of `output_gradient_energy`, or None
            where entries compare only within rows (`config_event.reads_importance`); `[L,O,I]` for "lora_gradient" and
            "dpruner": `lora_gradient_importance` or that of `efx_jax.training.importance`.
        packed: return the masks as bits, see `efx_jax.masks`.

    Returns:
        (params, adapters, masks, state). params changes only where an event moves the base, see `moves_base`.

    Raises:
        InputError: meaningless settings, a sparsity or group that does not fit, statistics without Grams or of another
            model, statistics or an importance that are not finite, a state without the memory that `ema` needs, no
            adapters where the recovery moves them, or no importance where the score reads it.
    """
    validate_prune(config)
    if config.sequential:
        raise InputError("prune.sequential: expected an event block by block; use prune_event_blockwise")
    if needs_gram(config):
        stats.require_gram()
    stats.require_model(params)
    plan = plan_event(params, adapters, masks, state, spec, config, stats, importance)
    return assemble(params, adapters, plan.state, stack_blocks(prune_from(plan, stats), spec.num_layers), packed)


@struct.dataclass
class Result:
    """The blocks pruned so far: stacked arrays with a leading axis L, and each block's moving averages on the host."""

    layers: Layer
    snapshots: dict[str, Array]
    score: dict[str, tuple[Array, ...]]


def block_before(plan: EventPlan, index: int) -> tuple[Layer, Memory]:
    """Block `index` as it enters the event, and its part of the moving average."""
    layer, snapshots = take_block((plan.stacked, plan.state.snapshots), index)
    score = {
        name: to_device(past[index]) if past else jnp.zeros(layer.weights[name].shape, jnp.float32)
        for name, past in plan.state.score.items()
    }
    return layer, {"snapshots": snapshots, "score": score}


def block_importance(plan: EventPlan, index: int) -> dict[str, Array]:
    """The importance of block `index` by linear, `[O,I]` or for "foresight_loss" `[O]`; {} if the score reads none."""
    kind = "reach" if plan.config.score == "foresight_loss" else "importance"
    taken: dict[str, Array] = take_block({kind: plan.importance}, index)[kind]
    return taken


def prune_one(plan: EventPlan, index: int, layer: Layer, stats: Statistics, memory: Memory) -> Block:
    """Block `index` after the event, by one program for all blocks and sparsities; its average goes to the host.

    Raises:
        InputError: statistics or an importance that are not finite, which would make the mask arbitrary.
    """
    importance = block_importance(plan, index)
    for found, name in ((stats, "prune.calibration: the activations"), (importance, "prune.score: the gradients")):
        if jax.tree.leaves(found) and not _is_finite(found):
            raise InputError(
                f"{name} of block {index} are not finite; calibrate on other rows, or set model.compute_dtype to "
                "float32, or to bfloat16 where it is float16"
            )
    layer, memory = _prune_block(
        layer,
        stats,
        importance,
        memory,
        plan.counts[index],
        plan.keys[index],
        plan.state.event,
        plan.spec,
        dataclasses.replace(plan.config, sparsity=0.0),
        plan.scale,
    )
    return layer, {**memory, "score": {name: to_host(score) for name, score in memory["score"].items()}}


def prune_from(plan: EventPlan, stats: Statistics) -> Iterator[Block]:
    """Every block after the event, in order, from statistics of the whole model."""
    tokens = jnp.broadcast_to(stats.tokens, (plan.spec.num_layers,))
    stats = dataclasses.replace(stats, tokens=tokens)
    for index in range(plan.spec.num_layers):
        layer, memory = block_before(plan, index)
        yield prune_one(plan, index, layer, take_block(stats, index), memory)


def stack_blocks(blocks: Iterable[Block], num_layers: int) -> Result:
    """All blocks after an event."""
    result: Result | None = None
    for index, block in enumerate(blocks):
        result = put_block(result, block, index, num_layers)
    assert result is not None
    return result


def put_block(result: Result | None, block: Block, index: int, num_layers: int) -> Result:
    """Writes a block into the stacked arrays, in place; the first block allocates them.

    Arrays that no event changes are left out: the new model shares them with the old one.
    """
    layer, memory = block
    here = (layer, memory["snapshots"])
    if result is None:
        layers, snapshots = _room(here, num_layers)
        result = Result(layers, snapshots, dict.fromkeys(memory["score"], ()))
    layers, snapshots = _put((result.layers, result.snapshots), here, index)
    score = {name: (*result.score[name], past) for name, past in memory["score"].items()}
    return Result(layers, snapshots, score)


def assemble(
    params: Mapping[str, Any], adapters: Adapters | None, state: PruneState, result: Result, packed: bool
) -> tuple[dict[str, Any], Adapters | None, dict[str, Array], PruneState]:
    """The event's outcome, as `prune_event` returns it."""
    layers = result.layers
    state = dataclasses.replace(state, event=state.event + 1, snapshots=result.snapshots, score=result.score)
    if adapters is not None:
        adapters = dataclasses.replace(adapters, lora_a=layers.lora_a, lora_b=layers.lora_b)
    masks = layers.masks
    if not packed:
        masks = _unpacked(masks, {name: params["layers"][name] for name in masks})
    return {**params, "layers": {**params["layers"], **layers.weights}}, adapters, masks, state


@jax.jit
def _is_finite(tree: Any) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@jax.jit
def _unpacked(masks: Mapping[str, Array], weights: Mapping[str, Array]) -> dict[str, Array]:
    return constrain_tree({name: unpack_mask(mask, weights[name].shape[-1]) for name, mask in masks.items()})


@jax.jit
def take_block(stacked: Any, index: Array | int) -> Any:
    """Block `index` of a tree whose arrays lead with L."""
    return constrain_tree(jax.tree.map(lambda leaf: leaf[index], stacked))


@functools.partial(jax.jit, static_argnums=1)
def _room(block: Any, num_layers: int) -> Any:
    return constrain_tree(jax.tree.map(lambda leaf: jnp.zeros((num_layers, *leaf.shape), leaf.dtype), block))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Any, block: Any, index: Array | int) -> Any:
    return constrain_tree(jax.tree.map(lambda whole, leaf: whole.at[index].set(leaf), stacked, block))


_prune_block = functools.partial(jax.jit, static_argnames=("spec", "config", "scale"))(prune_block)
