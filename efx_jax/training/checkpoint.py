"""Checkpoints of a run: adapters, optimizer, masks and pruning state; the base only if an event has rewritten it."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from efx_jax.data.tokens import Tokenized, checksum
from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.parallel.hosts import meet
from efx_jax.parallel.partition import block_on_host
from efx_jax.pruning.average import PruneState
from efx_jax.training.state import RunState

_Tree = dict[str, Any]
_PARTIAL = ".orbax-checkpoint-tmp"  # how Orbax marks incomplete checkpoints
_ASIDE = ".before-event"


def open_checkpoints(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of `folder`; saves are asynchronous, so close it (or use `with`) before leaving.

    Removes what a killed process left half written or half removed; restores what it had set aside, unless replaced.
    """
    if jax.process_index() == 0:
        for partial in folder.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(partial)
        for aside in folder.glob(f"*{_ASIDE}"):
            whole = aside.with_suffix("")
            if whole.exists():
                _remove(aside)
            else:
                aside.rename(whole)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, state: RunState, base_moved: bool, waiting: bool, origin: str, notes: dict[str, Any]
) -> None:
    """Saves after `state.train.step` updates.

    Args:
        manager: from `open_checkpoints`.
        state: what is saved; its `params` only if `base_moved`.
        base_moved: whether an event has rewritten the base.
        waiting: whether the event of this step is still to come; the save after the event replaces this one.
        origin: fingerprint of what the run started from.
        notes: JSON that `restore` returns with the state.
    """
    step = int(state.train.step)
    aside = None
    if manager.latest_step() == step:
        manager.wait_until_finished()
        if waiting or not _meta(manager, step)["waiting"]:
            return
        aside = _set_aside(manager, step)
    meta = {
        "base_moved": base_moved,
        "masked": bool(state.masks),
        "averaged": any(state.prune.score.values()),
        "waiting": waiting,
        "origin": origin,
        "notes": notes,
    }
    items = ocp.args.Composite(state=ocp.args.StandardSave(_to_tree(state, base_moved)), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=items)
    if aside is not None:
        manager.wait_until_finished()
        if jax.process_index() == 0:
            _remove(aside)


def restore(
    manager: ocp.CheckpointManager, template: RunState, mask_shapes: _Tree, origin: str, step: int | None = None
) -> tuple[RunState, bool, bool, dict[str, Any]] | None:
    """Reads a checkpoint, onto whatever mesh the template is on.

    Args:
        manager: from `open_checkpoints`.
        template: the run's state at step 0, which gives shapes, dtypes, shardings and the base; `train`, `units` and
            the snapshots may be `ShapeDtypeStruct`s.
        mask_shapes: `ShapeDtypeStruct` of every pruned linear's packed mask.
        origin: fingerprint of the current inputs.
        step: of the checkpoint; None: the latest.

    Returns:
        (state, base_moved, waiting, notes), see `save`; or None if there is no checkpoint.

    Raises:
        InputError: the checkpoint belongs to another base, another starting adapter, or other training data.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    meta = _meta(manager, step)
    if meta["origin"] != origin:
        raise InputError(
            f"{manager.directory}: was written on another base model or adapter, or on other training data "
            f"(fingerprint {meta['origin']}, found {origin}); bring back what model.path, lora.adapter and data.train "
            "held, or choose another --output"
        )
    prune = template.prune
    if meta["averaged"]:
        layers = template.params["layers"]
        score: Any = {name: (block_on_host(layers[name]),) * len(layers[name]) for name in prune.score}
        prune = dataclasses.replace(prune, score=score)
    wanted = _to_tree(
        dataclasses.replace(template, masks=mask_shapes if meta["masked"] else {}, prune=prune), meta["base_moved"]
    )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    tree = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    score = {name: tuple(blocks) for name, blocks in tree["prune"]["score"].items()}
    prune = PruneState(key=jax.random.wrap_key_data(tree["prune_key"]), **tree["prune"] | {"score": score})
    params = {**template.params, "layers": tree["layers"]} if meta["base_moved"] else template.params
    state = RunState(tree["train"], params, tree["masks"], prune, tree.get("units"))
    return state, meta["base_moved"], meta["waiting"], meta["notes"]


def _set_aside(manager: ocp.CheckpointManager, step: int) -> Path:
    """Makes room for another checkpoint of this step; moves the existing one to the returned path."""
    whole = Path(manager.directory) / str(step)
    aside = whole.with_name(f"{step}{_ASIDE}")
    if jax.process_index() == 0:
        whole.rename(aside)
    meet()
    manager.reload()
    return aside


def _remove(whole: Path) -> None:
    """Removes a checkpoint, renaming it first so that it never looks complete while its files are being deleted."""
    shutil.rmtree(whole.rename(whole.with_name(f"{whole.name}{_PARTIAL}")))


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def fingerprint(params: _Tree, sequences: Sequence[Tokenized], adapters: Adapters | None = None) -> str:
    """Checksums of all weights, computed on their devices, and of the training tokens: enough to notice a changed file.

    For a run that starts from an adapter, also a checksum of that.
    """
    start = "" if adapters is None else f"-{int(weights_checksum(adapters)):08x}"
    return f"{int(weights_checksum(params)):08x}-{checksum(sequences)}{start}"


@jax.jit
def weights_checksum(params: _Tree | Adapters) -> jax.Array:
    """A checksum of all arrays of a tree, uint32, computed on their devices."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(params):
        unsigned = jnp.uint32 if leaf.dtype.itemsize == 4 else jnp.uint16
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        # Not an arange reshaped to the leaf's shape: reshaping a sharded array gathers it whole.
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        # Odd multipliers by position, so that swapped entries do not cancel out.
        total = 31 * total + jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return total


def _to_tree(state: RunState, base_moved: bool) -> _Tree:
    """The state as Orbax stores it: arrays only, so the typed key becomes its data, and struct fields go by name."""
    prune = {"event": state.prune.event, "snapshots": state.prune.snapshots, "score": state.prune.score}
    tree = {
        "train": state.train,
        "masks": state.masks,
        "prune": prune,
        "prune_key": jax.random.key_data(state.prune.key),
    }
    tree |= {"layers": state.params["layers"]} if base_moved else {}
    return tree | ({} if state.units is None else {"units": state.units})
