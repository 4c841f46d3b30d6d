"""The checkpoints of one run: the latest ones, which it resumes from, and the best one, which it ends with."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from efx_jax.config import Config
from efx_jax.config_event import moves_base
from efx_jax.data.tokens import checksum
from efx_jax.errors import InputError
from efx_jax.masks import mask_shapes
from efx_jax.parallel.partition import placed_shapes
from efx_jax.training import checkpoint
from efx_jax.training.journal import Journal
from efx_jax.training.prepare import Prepared, tasks_checksum
from efx_jax.training.state import RunState


@dataclasses.dataclass(frozen=True, eq=False)
class Stores:
    """Where the states of a run are kept, and what reading and writing them takes.

    `best` is None if `eval.best` names no metric. `template` is that of the state, `masks` the shapes and shardings of
    packed masks, `origin` the fingerprint of what the run starts from, `measured` that of what it is measured on,
    `sources` that of everything else it reads. The journal is saved with each state.
    """

    latest: ocp.CheckpointManager
    best: ocp.CheckpointManager | None
    template: RunState
    masks: dict[str, jax.ShapeDtypeStruct]
    origin: str
    measured: str
    sources: str
    journal: Journal
    moves_base: bool


@contextlib.contextmanager
def open_stores(
    config: Config, prepared: Prepared, template: RunState, journal: Journal, mesh: jax.sharding.Mesh, output: Path
) -> Iterator[Stores]:
    """Opens `checkpoints/` in a run's folder, and `best/` if a metric chooses the best model."""
    measured = _measured(prepared)
    with contextlib.ExitStack() as stack:
        latest = stack.enter_context(checkpoint.open_checkpoints(output / "checkpoints", config.train.keep))
        chosen = config.eval.best
        yield Stores(
            latest=latest,
            best=stack.enter_context(checkpoint.open_checkpoints(output / "best", 1)) if chosen else None,
            template=template,
            masks=placed_shapes(mesh, mask_shapes(prepared.params["layers"], config.prune.targets)),
            origin=checkpoint.fingerprint(prepared.params, prepared.train, prepared.adapters),
            measured=measured,
            sources=_sources(prepared, measured),
            journal=journal,
            moves_base=moves_base(config.prune),
        )


def _measured(prepared: Prepared) -> str:
    """Fingerprint of the perplexity windows and the test rows."""
    return f"{tasks_checksum(prepared.data.tasks, int(checksum(prepared.windows), 16)):08x}"


def _sources(prepared: Prepared, measured: str) -> str:
    """Fingerprint of the calibration rows, of what is measured and, unless it is the base, of the teacher."""
    found, teacher = f"{checksum(itertools.chain(*prepared.pools))}-{measured}", prepared.teacher
    if teacher is None or teacher.params is prepared.params:
        return found
    return f"{found}-{int(checkpoint.weights_checksum(teacher.params)):08x}"


def restore_latest(stores: Stores) -> tuple[RunState, bool, bool, dict[str, Any]] | None:
    """See `efx_jax.training.checkpoint.restore`.

    Raises:
        InputError: as there; or the checkpoint's run had other calibration or evaluation rows, or another teacher.
    """
    found = checkpoint.restore(stores.latest, stores.template, stores.masks, stores.origin)
    if found is not None and found[3]["sources"] != stores.sources:
        raise InputError(
            f"{stores.latest.directory}: was written by a run that calibrates or is measured on other rows, or has "
            f"another teacher (fingerprint {found[3]['sources']}, found {stores.sources}); bring back what "
            "prune.calibration, data.text, data.test and distill.teacher held, or choose another --output"
        )
    return found


def save(stores: Stores, state: RunState, waiting: bool = False) -> None:
    """Saves a state as the latest one; `waiting`: the event of its step is still to come."""
    _save(stores, stores.latest, state, waiting)


def save_best(stores: Stores, state: RunState) -> None:
    """Saves a state as the best one, waiting before and after, so that no later checkpoint names one never saved."""
    assert stores.best is not None
    stores.latest.wait_until_finished()
    _save(stores, stores.best, state, waiting=False)
    stores.best.wait_until_finished()


def forget_later_best(stores: Stores, start: int) -> None:
    """Removes best states later than `start`, the step resumed from: Orbax would refuse to save an earlier step."""
    if stores.best is not None:
        for step in stores.best.all_steps():
            if step > start:
                stores.best.delete(step)


def _save(stores: Stores, manager: ocp.CheckpointManager, state: RunState, waiting: bool) -> None:
    with stores.journal.phase("checkpoint"):
        base_moved = stores.moves_base and bool(state.masks)
        notes = {**dataclasses.asdict(stores.journal), "measured": stores.measured, "sources": stores.sources}
        checkpoint.save(manager, state, base_moved, waiting, stores.origin, notes)


def best_state(stores: Stores, last: RunState) -> RunState:
    """The state that a run ends with: its last one, or the best one if a metric has chosen another.

    Raises:
        InputError: the checkpoint of the best one is missing.
    """
    best = stores.journal.best
    if stores.best is None or best is None or best.step == int(last.train.step):
        return last
    found = checkpoint.restore(stores.best, stores.template, stores.masks, stores.origin)
    if found is None or int(found[0].train.step) != best.step:
        raise InputError(
            f"{stores.best.directory}: the checkpoint of step {best.step}, the best, is not there; bring it back, or "
            "choose another --output"
        )
    return found[0]
