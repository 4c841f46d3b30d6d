"""What the checkpoints of a run hold: adapters, masks, and a base that events have changed."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from efx_jax.analysis.runs import Run, held_steps, listed
from efx_jax.errors import InputError, first_line
from efx_jax.lora import Adapters, init_lora, lora_scale
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.weights.peft import load_adapter


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The kind of checkpoint at a step: how many events came before it, whether it has masks, and its own base."""

    step: int
    events: int
    masked: bool
    base_moved: bool


def refuse_cut_units(run: Run) -> None:
    """Refuses a run that cannot have masks of single entries.

    Raises:
        InputError: the run cuts out whole units.
    """
    if run.config.prune.score == "atp" and run.config.prune.sparsity:
        raise InputError(f"{run.folder}: cuts out whole units; what is left of them stands under `cut` in summary.json")


def refuse_permuted(*runs: Run) -> None:
    """Refuses runs that cannot be compared row by row with the base or with another run.

    Raises:
        InputError: a run whose events have reordered its units.
    """
    for run in runs:
        if run.config.prune.permute and run.config.prune.sparsity:
            raise InputError(
                f"{run.folder}: its units have changed places (prune.permute), so that its lines are not those of the "
                "base or of another run; choose a run without"
            )


def dense_steps(run: Run) -> tuple[int, ...]:
    """The steps of the checkpoints before any prune event, ascending.

    Raises:
        InputError: every checkpoint holds masks or a base that an event has changed, or the run cuts out whole units.
    """
    refuse_cut_units(run)
    dense = tuple(step for step in held_steps(run) if not _pruned(run, step))
    if not dense:
        raise InputError(
            f"{run.folder}: every checkpoint ({listed(run.steps)}) is pruned; expected one from before the first "
            "event; train with prune.sparsity 0 and a small train.checkpoint_every"
        )
    return dense


def choose_steps(run: Run, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The steps to look at: the requested ones, else 0 (the original base) and every dense checkpoint.

    Raises:
        InputError: a step without a checkpoint, or with a pruned one.
    """
    dense = dense_steps(run)
    missing = [step for step in asked if step != 0 and step not in dense]
    if missing:
        raise InputError(
            f"{run.folder}: no dense checkpoint of step {missing[0]}; expected among 0, {listed(dense)}; train "
            "with train.checkpoint_every and a larger train.keep"
        )
    return tuple(sorted(set(asked))) if asked else (0, *dense)


def read_checkpoint(run: Run, step: int) -> Checkpoint:
    """The kind of the checkpoint after `step` updates.

    Raises:
        InputError: it cannot be read.
    """
    moved, masked = moved_and_masked(run, step)
    events = int(_restore_arrays(run, step, {"prune": {"event": None}})["prune"]["event"])
    return Checkpoint(step, events, masked, moved)


def moved_and_masked(run: Run, step: int) -> tuple[bool, bool]:
    """Whether an event before the checkpoint has rewritten the base, and whether it holds masks.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    meta = _restore(run, step, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    try:
        return bool(meta["base_moved"]), bool(meta["masked"])
    except KeyError as error:
        raise InputError(f"{run.folder}: its checkpoint of step {step} does not say {error}; train it again") from error


def run_adapters(run: Run, step: int) -> Adapters | None:
    """The adapters after `step` updates, float32, without the rest of the checkpoint; None at step 0.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    return None if step == 0 else jax.tree.map(jnp.asarray, held_adapters(run, step))


def held_adapters(run: Run, step: int) -> Adapters:
    """The adapters of a checkpoint as NumPy arrays, including step 0.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    lora = run.config.lora
    names = dict.fromkeys(lora.targets)
    wanted = {"train": {"adapters": {"lora_a": names, "lora_b": names}}}
    tree = _restore_arrays(run, step, wanted)["train"]["adapters"]
    return Adapters(tree["lora_a"], tree["lora_b"], lora_scale(lora.rank, lora.alpha, lora.rslora))


def run_masks(run: Run, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The masks of a checkpoint, packed, uint8 `[L,O,ceil(I/8)]` (see `efx_jax.masks`); {} if there are none.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if not checkpoint.masked:
        return {}
    return _restore_arrays(run, checkpoint.step, {"masks": dict.fromkeys(run.config.prune.targets)})["masks"]


def run_linears(run: Run, checkpoint: Checkpoint, names: Iterable[str] = LINEARS) -> dict[str, np.ndarray]:
    """The base linears `[L,O,I]` that the events have rewritten, in their own dtype; {} if they are unchanged.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if not checkpoint.base_moved:
        return {}
    return _restore_arrays(run, checkpoint.step, {"layers": dict.fromkeys(names)})["layers"]


def before_event(run: Run, params: Mapping[str, Any], spec: ModelSpec) -> tuple[int, Adapters]:
    """The latest step before any event, and its adapters; at step 0 those that training begins with.

    Raises:
        InputError: a checkpoint cannot be read.
    """
    step = max((step for step in run.steps if not _pruned(run, step)), default=0)
    adapters = run_adapters(run, step)
    if adapters is None and run.config.lora.adapter:
        return step, load_adapter(run.config.lora.adapter, spec)
    if adapters is None:
        # Drawn as in the run: from the first of three keys (efx_jax.training.loop).
        key = jax.random.split(jax.random.key(run.config.seed), 3)[0]
        lora = run.config.lora
        adapters = init_lora(key, params, spec, lora.rank, lora.alpha, lora.targets, lora.rslora)
    return step, adapters


def _pruned(run: Run, step: int) -> bool:
    return any(moved_and_masked(run, step))


def _restore_arrays(run: Run, step: int, wanted: Any) -> Any:
    """Some of a checkpoint's arrays as NumPy arrays; `wanted` is their tree, with None in place of each array."""
    item = jax.tree.map(lambda _: np.zeros(0, np.float32), wanted, is_leaf=lambda leaf: leaf is None)
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
        partial_restore=True,
    )
    return _restore(run, step, "state", ocp.PyTreeCheckpointHandler(), arguments)


def _restore(run: Run, step: int, item: str, handler: Any, arguments: Any) -> Any:
    path = run.folder / run.kind / str(step) / item
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path.absolute(), args=arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise InputError(f"{path}: cannot be read as a checkpoint of this run: {reason}; train it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's warnings about parts of a checkpoint that are deliberately not read."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
