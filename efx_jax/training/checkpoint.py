"""Checkpoints of a run: adapters, optimizer, masks and pruning state; the base only where an event has moved it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from efx_jax.pruning.average import PruneState
from efx_jax.training.state import RunState

_Tree = dict[str, Any]


def open_checkpoints(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of `folder`; saves are asynchronous, so close it (or use `with`) before leaving."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: RunState, base_moved: bool, notes: dict[str, Any]) -> None:
    """Saves after `state.train.step` updates.

    Args:
        manager: from `open_checkpoints`.
        state: what is saved; its `params` only if `base_moved`.
        base_moved: whether an event has rewritten the base.
        notes: JSON that comes back with the state.
    """
    step = int(state.train.step)
    if manager.latest_step() == step:
        return
    meta = {"base_moved": base_moved, "masked": bool(state.masks), "notes": notes}
    items = ocp.args.Composite(state=ocp.args.StandardSave(_to_tree(state, base_moved)), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=items)


def restore(
    manager: ocp.CheckpointManager, fresh: RunState, mask_shapes: _Tree
) -> tuple[RunState, bool, dict[str, Any]] | None:
    """Reads the latest checkpoint.

    Args:
        manager: from `open_checkpoints`.
        fresh: the run's state at step 0, which gives shapes, dtypes and the base.
        mask_shapes: bool `ShapeDtypeStruct [L,O,I]` of every pruned linear.

    Returns:
        (state, base_moved, notes), or None without a checkpoint.
    """
    step = manager.latest_step()
    if step is None:
        return None
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    template = _to_tree(dataclasses.replace(fresh, masks=mask_shapes if meta["masked"] else {}), meta["base_moved"])
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    tree = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    prune = PruneState(key=jax.random.wrap_key_data(tree["prune_key"]), **tree["prune"])
    params = {**fresh.params, "layers": tree["layers"]} if meta["base_moved"] else fresh.params
    state = RunState(train=tree["train"], params=params, masks=tree["masks"], prune=prune)
    return state, meta["base_moved"], meta["notes"]


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes of the latest checkpoint of a run, without its arrays; {} where there is none."""
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    if not steps:
        return {}
    return dict(json.loads((folder / str(steps[-1]) / "meta" / "metadata").read_text())["notes"])


def _to_tree(state: RunState, base_moved: bool) -> _Tree:
    """Orbax stores arrays: the typed key goes as its data, and struct fields by name."""
    prune = {"event": state.prune.event, "snapshots": state.prune.snapshots, "score": state.prune.score}
    tree = {
        "train": state.train,
        "masks": state.masks,
        "prune": prune,
        "prune_key": jax.random.key_data(state.prune.key),
    }
    return tree | ({"layers": state.params["layers"]} if base_moved else {})
