"""ATP during a run: searches for units to prune until its event, trains on without them, and cuts them out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from efx_jax.config import Config, Space
from efx_jax.lora import merge
from efx_jax.model.spec import ModelSpec
from efx_jax.parallel.partition import constrain_tree, tree_shardings
from efx_jax.structural.generator import Generator, draw_hard, init_generator, unit_logits
from efx_jax.structural.slicing import promise, settle_masks, slice_model
from efx_jax.structural.units import kept_fraction, units_of, weight_masks, without_pruned_biases
from efx_jax.training.atp import adapter_step, generator_optimizer, generator_step, init_generator_state
from efx_jax.training.feed import distant_batch, epoch_rows, mesh_batch
from efx_jax.training.prepare import Prepared
from efx_jax.training.schedule import Event
from efx_jax.training.state import RunState, UnitState
from efx_jax.training.step import Batch, StepOptions

Array = jax.Array
Params = dict[str, Any]
_init_generator = jax.jit(init_generator, static_argnames=("spec", "space"))
_unit_logits = jax.jit(unit_logits)


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """What every step of ATP reads and none changes.

    Attributes:
        spec: the model.
        space: which units.
        ratio: share of the weights of the seven linears to remove.
        end: number of updates in which the generator learns too.
        steps: number of updates of the run.
        generator_tx: the generator's optimizer.
        adapter_tx: the adapters' optimizer.
        learning_rate: its schedule.
        first_key: PRNG key that initializes the generator.
        noise_key: PRNG key of the noise that it learns under.
        mask_key: PRNG key of the noise in the masks that the adapters learn under.
        dropout_key: the run's PRNG key of dropout.
        other_batch: number of an update -> the batch that the generator learns from.
        options_of: how a batch is computed.
    """

    spec: ModelSpec
    space: Space
    ratio: float
    end: int
    steps: int
    generator_tx: optax.GradientTransformation
    adapter_tx: optax.GradientTransformation
    learning_rate: optax.Schedule
    first_key: Array
    noise_key: Array
    mask_key: Array
    dropout_key: Array
    other_batch: Callable[[int], Batch]
    options_of: Callable[[Batch], StepOptions]


def plan_search(
    config: Config,
    prepared: Prepared,
    mesh: Mesh,
    steps: int,
    events: Sequence[Event],
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    dropout_key: Array,
    options_of: Callable[[Batch], StepOptions],
) -> Search | None:
    """The search of a run, or None if it prunes entries or nothing.

    Its batches are those of the run, in another order: `feed.distant_batch`. (The original ATP learns its masks on
    separate rows; here every method of a comparison has the same rows.)

    Args:
        config: the settings.
        prepared: model and rows.
        mesh: the devices.
        steps: updates of the run.
        events: for ATP a single one, the end of the search.
        tx: the adapters' optimizer.
        rate: its learning rate.
        dropout_key: the run's key of dropout.
        options_of: how a batch is computed.
    """
    if config.prune.score != "atp" or not events:
        return None
    rows = epoch_rows(config, prepared.train)

    def other_batch(number: int) -> Batch:
        return mesh_batch(config, prepared.train, distant_batch(number, rows, config.train.batch_size), mesh)

    # Separate from the keys that the loop splits off the same seed.
    search_key = jax.random.fold_in(jax.random.key(config.seed), 3)
    first_key, noise_key, mask_key = jax.random.split(search_key, 3)
    (event,) = events
    return Search(
        spec=prepared.spec,
        space=config.atp.space,
        ratio=event.sparsity,
        end=event.step,
        steps=steps,
        generator_tx=generator_optimizer(config.atp.learning_rate),
        adapter_tx=tx,
        learning_rate=rate,
        first_key=first_key,
        noise_key=noise_key,
        mask_key=mask_key,
        dropout_key=dropout_key,
        other_batch=other_batch,
        options_of=options_of,
    )


def fresh_units(search: Search, mesh: Mesh) -> UnitState:
    """A new generator on the mesh, and masks that keep every unit."""
    generator = _init_generator(search.first_key, search.spec, search.space)
    shape = {kind: (search.spec.num_layers, units.count) for kind, units in units_of(search.spec, search.space).items()}
    masks = {kind: jnp.ones(each, bool) for kind, each in shape.items()}
    fresh = UnitState(init_generator_state(generator, search.generator_tx), masks)
    return jax.device_put(fresh, tree_shardings(mesh, fresh))


def search_step(search: Search, state: RunState, batch: Batch) -> tuple[RunState, dict[str, Array]]:
    """One update of ATP: of the generator during the search, then of the adapters.

    During the search, the adapters learn under masks drawn anew from the current generator; afterwards under the
    final ones. The group lasso continues to the end of the run.

    Args:
        search: the run's search.
        state: the state; buffers of its `train` and of the generator are consumed.
        batch: what the adapters learn from.

    Returns:
        The new state and float32 scalars: those of `training.step`, `sparsity` (share of the weights of the seven
        linears that this step's masks leave out), and during the search `generator_loss`, `generator_kept` (p of the
        draw that it has learned from), `generator_grad_norm` and `generator_norm`.
    """
    assert state.units is not None
    number = int(state.train.step)
    units, masks = state.units, state.units.masks
    found: dict[str, Array] = {}
    if number < search.end:
        units, found = _learn_units(search, state, units, number)
        masks = _draw_masks(units.generator.generator, search.mask_key, number)
    train, metrics = adapter_step(
        state.train,
        state.params,
        masks,
        batch,
        search.dropout_key,
        search.steps,
        search.spec,
        search.space,
        search.adapter_tx,
        search.learning_rate,
        search.options_of(batch),
    )
    found["sparsity"] = _sparsity(masks, search.spec, search.space)
    return dataclasses.replace(state, train=train, units=units), metrics | found


def _learn_units(search: Search, state: RunState, units: UnitState, number: int) -> tuple[UnitState, dict[str, Array]]:
    """One update of the generator, from a batch that the adapters do not learn from in this step."""
    batch = search.other_batch(number)
    generator, metrics = generator_step(
        units.generator,
        state.params,
        state.train.adapters,
        batch,
        search.noise_key,
        search.ratio,
        search.spec,
        search.space,
        search.generator_tx,
        search.options_of(batch),
    )
    found = {f"generator_{name}": metrics[name] for name in ("loss", "kept", "grad_norm", "norm")}
    return dataclasses.replace(units, generator=generator), found


def end_search(search: Search, state: RunState, mesh: Mesh) -> RunState:
    """The state with the final masks, see `structural.slicing.settle_masks`."""
    assert state.units is not None
    logits = jax.device_get(_unit_logits(state.units.generator.generator))
    masks: Any = settle_masks(logits, search.spec, search.space, search.ratio)
    masks = jax.device_put(masks, tree_shardings(mesh, masks))
    return dataclasses.replace(state, units=dataclasses.replace(state.units, masks=masks))


def masked_base(search: Search, state: RunState) -> tuple[Params, dict[str, Array]]:
    """The parameters and the weight masks `[L,O,ceil(I/8)]` of the current model, before units are cut out."""
    assert state.units is not None
    masks = state.units.masks
    params = without_pruned_biases(state.params, masks, search.spec, search.space)
    return params, _weight_masks(masks, search.spec, search.space)


def cut_out(state: RunState, spec: ModelSpec, space: Space) -> tuple[Params, ModelSpec]:
    """The smaller model with its adapters merged, and its spec."""
    assert state.units is not None
    params, adapters, small = slice_model(state.params, state.train.adapters, state.units.masks, spec, space)
    return merge(params, adapters, None), small


def cut_report(state: RunState, spec: ModelSpec, space: Space) -> dict[str, Any]:
    """What `summary.json` says about the smaller model.

    Returns:
        `space`; `parameters`: how many the whole model had `before`, how many the masks `kept`, and how many the export
        has (`written`, the difference being zeros as padding); `removed`, the share of the weights of the seven linears
        that is gone or zero; and `units`, kind -> how many every layer keeps.
    """
    assert state.units is not None
    masks = jax.device_get(state.units.masks)
    found = promise(masks, spec, space)
    return {
        "space": space,
        "parameters": {"before": found.original, "kept": found.kept, "written": found.written},
        "removed": float(_sparsity(masks, spec, space)),
        "units": {kind: [int(count) for count in np.sum(mask, axis=1)] for kind, mask in masks.items()},
    }


@jax.jit
def _draw_masks(generator: Generator, key: Array, number: Array | int) -> dict[str, Array]:
    """The unit masks of update `number`."""
    return constrain_tree(draw_hard(generator, jax.random.fold_in(key, number)))


@functools.partial(jax.jit, static_argnames=("spec", "space"))
def _weight_masks(masks: Mapping[str, Array], spec: ModelSpec, space: Space) -> dict[str, Array]:
    return weight_masks(masks, spec, space)


@functools.partial(jax.jit, static_argnames=("spec", "space"))
def _sparsity(masks: Mapping[str, Array], spec: ModelSpec, space: Space) -> Array:
    return 1.0 - kept_fraction(masks, spec, space)
