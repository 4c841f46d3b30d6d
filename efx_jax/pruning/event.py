"""One prune event: score -> moving average -> mask -> recovery, one block after the other by one compiled program.

`prune_event` takes statistics of the whole model, collected in one pass. `efx_jax.pruning.blockwise` collects them
block by block, so that only one block's Grams exist. Both run the same `prune_block`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.config import GRADIENT_SCORES, PruneConfig
from efx_jax.config_prune import validate_prune
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.masks import pack_mask, unpack_mask
from efx_jax.model.decoder import Layer, stack_layers
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import constrain_tree, to_device, to_host
from efx_jax.pruning.average import Memory, PruneState, init_prune_state, keeps_scores, prunable
from efx_jax.pruning.block import matrix_group, prune_block
from efx_jax.pruning.budget import event_budgets
from efx_jax.pruning.selection import Counts, selection_counts
from efx_jax.pruning.sparsegpt import slab_counts
from efx_jax.pruning.statistics import Statistics

Array = jax.Array
# A block after the event, and its part of the moving average.
Block = tuple[Layer, Memory]


def reads_importance(config: PruneConfig) -> bool:
    """Whether the score reads gradients, which `prune_event` is given."""
    return config.score in GRADIENT_SCORES or config.score == "foresight_loss"


def needs_gram(config: PruneConfig) -> bool:
    """Whether score, swaps or recovery read Gram matrices."""
    return config.score == "sparsegpt" or config.swaps > 0 or config.recovery in ("gram_pbs", "admm", "obs")


def goes_by_block(config: PruneConfig) -> bool:
    """Whether a run's events calibrate block by block: what is large, Grams and averages, exists for one at a time."""
    return config.sequential or needs_gram(config) or (config.ema < 1 and keeps_scores(config))


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
        importance: name -> float32 `[L,O,I]` for the scores that read gradients, `[L,O]` for "foresight_loss"; see
            `efx_jax.training.importance`.
        packed: return the masks as bits, see `efx_jax.masks`.

    Returns:
        (params, adapters, masks, state). params changes only where an event moves the base, see `moves_base`.

    Raises:
        InputError: settings that mean nothing, a sparsity or group that does not fit, statistics without Grams or
            or an importance not finite, a state without the memory that `ema` needs, adapters to move where there are
            none, no importance to score by.
    """
    plan = plan_event(params, adapters, masks, state, spec, config, stats, importance)
    if config.dense_path:
        raise InputError("prune.dense_path: expected an event block by block; use prune_event_blockwise")
    if needs_gram(config):
        stats.input_gram(next(iter(plan.counts[0])))
    return assemble(params, adapters, plan.state, stack_blocks(prune_from(plan, stats), spec.num_layers), packed)


@dataclasses.dataclass(frozen=True, eq=False)
class EventPlan:
    """An event's inputs, checked: the stacked model, the state to start from, what every layer drops by matrix.

    `importance` is that of the pruned linears, stacked, where the score reads it; {} elsewhere.
    """

    stacked: Layer
    importance: dict[str, Array]
    state: PruneState
    counts: tuple[dict[str, Counts], ...]
    keys: Array
    spec: ModelSpec
    config: PruneConfig
    scale: float


@struct.dataclass
class Result:
    """What blocks have become so far: stacked arrays that lead with L, and the moving averages of each on the host."""

    layers: Layer
    snapshots: dict[str, Array]
    score: dict[str, tuple[Array, ...]]


def plan_event(
    params: Mapping[str, Any],
    adapters: Adapters | None,
    masks: Mapping[str, Array] | None,
    state: PruneState | None,
    spec: ModelSpec,
    config: PruneConfig,
    stats: Statistics | None = None,
    importance: Mapping[str, Array] | None = None,
) -> EventPlan:
    """Checks an event before any work.

    Args:
        stats: statistics of the whole model, where `config.budget` needs them.

    The other arguments and the errors are those of `prune_event`.
    """
    state = check_event(params, adapters, state, config)
    names = prunable(params["layers"], config)
    importance = _read_importance(importance or {}, params["layers"], names, config)
    budgets = event_budgets(params, adapters, stats, importance, spec, config)
    return EventPlan(
        stacked=stack_layers(params, adapters, None if masks is None else _packed(masks)),
        importance=importance,
        state=state,
        counts=tuple(event_counts(params["layers"], config, budget) for budget in budgets),
        keys=jax.random.split(jax.random.fold_in(state.key, state.event), spec.num_layers),
        spec=spec,
        config=config,
        scale=1.0 if adapters is None else adapters.scale,
    )


def block_before(plan: EventPlan, index: int) -> tuple[Layer, Memory]:
    """Block `index` as it enters the event, and its part of the moving average."""
    layer, snapshots = take_block((plan.stacked, plan.state.snapshots), index)
    score = {
        name: to_device(past[index]) if past else jnp.zeros(layer.weights[name].shape, jnp.float32)
        for name, past in plan.state.score.items()
    }
    return layer, {"snapshots": snapshots, "score": score}


def block_importance(plan: EventPlan, index: int) -> dict[str, Array]:
    """The importance of block `index` by linear, `[O,I]` or for "foresight_loss" `[O]`; {} where no score reads it."""
    kind = "reach" if plan.config.score == "foresight_loss" else "importance"
    taken: dict[str, Array] = take_block({kind: plan.importance}, index)[kind]
    return taken


def prune_one(plan: EventPlan, index: int, layer: Layer, stats: Statistics, memory: Memory) -> Block:
    """Block `index` after the event, by one program for all blocks and sparsities; its average goes to the host.

    Raises:
        InputError: statistics or an importance that are not finite, of which any mask could come.
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
    """Writes a block among the others, in place; the first one makes room for all.

    Whatever no event moves is left out: the new model shares it with the old one.
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
def _packed(masks: Mapping[str, Array]) -> dict[str, Array]:
    return constrain_tree({name: pack_mask(mask) if mask.dtype == jnp.bool_ else mask for name, mask in masks.items()})


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


def check_event(
    params: Mapping[str, Any], adapters: Adapters | None, state: PruneState | None, config: PruneConfig
) -> PruneState:
    """The state to start from, an empty one where there is none yet.

    Raises:
        InputError: as `prune_event`.
    """
    validate_prune(config)
    if config.permute:
        raise InputError(
            "prune.permute: an event leaves units where they are, expected False; call find_order and permute of "
            "efx_jax.pruning.permutation before it"
        )
    if adapters is None and config.recovery in ("pbs", "gram_pbs"):
        raise InputError(f"prune.recovery {config.recovery} moves adapters, found none; pass adapters, or take admm")
    if state is None:
        return init_prune_state(params, adapters, config, jax.random.key(0))
    marked = {name.removeprefix("reach/") for name in state.snapshots if name.startswith("reach/")}
    held = state.score.keys() if keeps_scores(config) else marked
    if config.ema < 1 and not held >= set(prunable(params["layers"], config)):
        raise InputError(
            f"prune.ema {config.ema}: the state has no memory of these matrices; make it by init_prune_state with "
            "these settings"
        )
    return state


def _read_importance(
    importance: Mapping[str, Array], layers: Mapping[str, Array], names: tuple[str, ...], config: PruneConfig
) -> dict[str, Array]:
    """What the score reads of the importance."""
    if not reads_importance(config):
        return {}
    by_entry = config.score in GRADIENT_SCORES
    shapes = {name: layers[name].shape if by_entry else layers[name].shape[:2] for name in names}
    wrong = [name for name in names if name not in importance or importance[name].shape != shapes[name]]
    if wrong:
        raise InputError(
            f"prune.score {config.score} reads gradients: expected an importance {'[L,O,I]' if by_entry else '[L,O]'} "
            f"for each of prune.targets, found none for {', '.join(wrong)}; pass it to prune_event"
        )
    return {name: importance[name] for name in names}


def event_counts(layers: Mapping[str, Array], config: PruneConfig, budget: Mapping[str, float]) -> dict[str, Counts]:
    """Exact counts of a layer's matrices from their sparsities, on the host: a new one needs no new program."""

    def counts(name: str, sparsity: float) -> Counts:
        shape, group = layers[name].shape, matrix_group(name, config)
        if config.score == "sparsegpt":
            return slab_counts(shape, sparsity, group)
        return selection_counts(shape, sparsity, group, config.bound)

    return {name: counts(name, sparsity) for name, sparsity in budget.items()}


_prune_block = functools.partial(jax.jit, static_argnames=("spec", "config", "scale"))(prune_block)
