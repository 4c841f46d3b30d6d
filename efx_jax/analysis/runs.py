"""Reading a run's folder: its settings, the adapters of its checkpoints, and rows that it was trained on."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from efx_jax.config import Config
from efx_jax.config_io import from_yaml
from efx_jax.data.batches import Batch, calibration_batches, round_up
from efx_jax.data.tasks import load_data
from efx_jax.data.tokens import tokenize
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, lora_scale
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.bundle_write import Outcome
from efx_jax.weights.hf import load_pretrained, load_tokenizer
from efx_jax.weights.sparsity import Asked, pattern_of

_MULTIPLE = 32  # what calibration_batches rounds lengths up to


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that `train.py` has written: its settings, and the steps of which it holds a checkpoint, ascending."""

    folder: Path
    config: Config
    steps: tuple[int, ...]


def open_run(folder: Path) -> Run:
    """Reads what a run is; no array yet.

    Raises:
        InputError: not a run, settings that this version does not know, or no checkpoint.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: is not a run; expected a folder that train.py has written, with config.yaml")
    config = from_yaml(path.read_text(encoding="utf-8"), str(path))
    # A checkpoint that is not whole has a name with a suffix.
    names = [entry.name for entry in (folder / "checkpoints").glob("*") if (entry / "state").is_dir()]
    steps = tuple(sorted(int(name) for name in names if name.isdigit()))
    if not steps:
        raise InputError(f"{folder}: holds no checkpoint; expected one in {folder / 'checkpoints'}; train it first")
    return Run(folder, config, steps)


def dense_steps(run: Run) -> tuple[int, ...]:
    """The steps of the checkpoints that no prune event has come before, ascending.

    Raises:
        InputError: every checkpoint holds masks or a base that an event has moved.
    """
    dense = tuple(step for step in run.steps if not _pruned(run, step))
    if not dense:
        raise InputError(
            f"{run.folder}: every checkpoint ({_listed(run.steps)}) is pruned; expected one from before the first "
            "event; train with prune.sparsity 0 and a small train.checkpoint_every"
        )
    return dense


def choose_steps(run: Run, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The steps to look at: those asked for, else 0 (the base as it was) and every dense checkpoint.

    Raises:
        InputError: a step without a checkpoint, or of a pruned one.
    """
    dense = dense_steps(run)
    missing = [step for step in asked if step != 0 and step not in dense]
    if missing:
        raise InputError(
            f"{run.folder}: no dense checkpoint of step {missing[0]}; expected among 0, {_listed(dense)}; train "
            "with train.checkpoint_every and a larger train.keep"
        )
    return tuple(sorted(set(asked))) if asked else (0, *dense)


def run_adapters(run: Run, step: int) -> Adapters | None:
    """The adapters after `step` updates, float32, without the rest of the checkpoint; None at step 0.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    if step == 0:
        return None
    lora = run.config.lora
    names = dict.fromkeys(lora.targets, np.zeros(0, np.float32))
    place = run.folder / "checkpoints" / str(step)
    tree = _restore_arrays(place, {"train": {"adapters": {"lora_a": names, "lora_b": names}}})["train"]["adapters"]
    scale = lora_scale(lora.rank, lora.alpha, lora.rslora)
    return Adapters(
        lora_a={name: jnp.asarray(array) for name, array in tree["lora_a"].items()},
        lora_b={name: jnp.asarray(array) for name, array in tree["lora_b"].items()},
        scale=scale,
    )


def run_outcome(run: Run) -> Outcome:
    """What a finished run has exported, from its checkpoint of that step.

    Raises:
        InputError: the run is not finished, cut out whole units (ATP), or its checkpoint is gone or damaged.
    """
    config = run.config
    if config.prune.score == "atp" and config.prune.sparsity:
        raise InputError(
            f"{run.folder}: has cut out whole units (prune.score atp): its export has other shapes than its base "
            "and is small as it is; ship the export"
        )
    if not (run.folder / "summary.json").is_file() or not (run.folder / "export").is_dir():
        raise InputError(f"{run.folder}: is not finished; expected summary.json and export/; let the run finish first")
    step = json.loads((run.folder / "summary.json").read_text())["steps"]
    place = run.folder / "best" / str(step)
    if not config.eval.best or not place.is_dir():
        place = run.folder / "checkpoints" / str(step)
    meta = _restore_item(place, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    lora = config.lora
    names = dict.fromkeys(lora.targets, np.zeros(0, np.float32))
    tree = _restore_arrays(place, {"train": {"adapters": {"lora_a": names, "lora_b": names}}})["train"]["adapters"]
    masks: dict[str, np.ndarray] = {}
    if meta["masked"]:
        masks = _restore_arrays(place, {"masks": dict.fromkeys(config.prune.targets, np.zeros(0, np.uint8))})["masks"]

    def moved(name: str) -> np.ndarray:
        return _restore_arrays(place, {"layers": {name: np.zeros(0, np.float32)}})["layers"][name]

    return Outcome(
        base=config.model.path,
        dtype=None if config.model.dtype == "keep" else config.model.dtype,
        adapters=Adapters(
            lora_a=tree["lora_a"], lora_b=tree["lora_b"], scale=lora_scale(lora.rank, lora.alpha, lora.rslora)
        ),
        masks=masks,
        moved=moved if meta["base_moved"] else None,
        asked=Asked(dict.fromkeys(masks, pattern_of(config.prune.group)), config.prune.sparsity),
        export=run.folder / "export",
    )


def load_base(run: Run) -> tuple[dict[str, Any], ModelSpec]:
    """The model that the run started from, each tensor in its own dtype."""
    return load_pretrained(run.config.model.path, None)


def training_rows(run: Run, spec: ModelSpec, rows: int, length: int) -> Batch:
    """Some of the run's training sequences as one right-padded batch, the longest first.

    Args:
        run: the run.
        spec: the model.
        rows: sequences drawn by the run's seed, all where there are fewer.
        length: most tokens of each.

    Returns:
        `tokens` int32 [B,T] and `lengths` int32 [B].

    Raises:
        InputError: the run's data cannot be read.
    """
    config = run.config
    tokenizer = load_tokenizer(config.model.path)
    data = load_data(config.data, config.seed, tokenizer, rows=1)
    sequences = tokenize(data.train, tokenizer, config.data.max_length, config.data.loss_on)
    length = min(length, spec.max_position_embeddings)
    room = rows * round_up(length, _MULTIPLE)
    batch = next(calibration_batches(sequences, config.seed, rows, length, room))
    filled = batch["lengths"] > 0
    return {"tokens": batch["tokens"][filled], "lengths": batch["lengths"][filled]}


def first_and_last(steps: Iterable[int]) -> list[int]:
    """The two ends of some steps, or the only one."""
    found = sorted(steps)
    return sorted({found[0], found[-1]})


def _pruned(run: Run, step: int) -> bool:
    place = run.folder / "checkpoints" / str(step)
    meta = _restore_item(place, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    return bool(meta["masked"] or meta["base_moved"])


def _restore_arrays(place: Path, tree: dict[str, Any]) -> Any:
    """Some arrays of a checkpoint as numpy arrays, without the rest; `tree` has theirs in the same places."""
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    arguments = ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True)
    return _restore_item(place, "state", ocp.PyTreeCheckpointHandler(), arguments)


def _restore_item(place: Path, item: str, handler: Any, arguments: Any) -> Any:
    path = place / item
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path.absolute(), args=arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{path}: cannot be read as a checkpoint of this run: {reason}; train it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of parts that a reader leaves alone on purpose."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _listed(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps))
