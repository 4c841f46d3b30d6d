"""Reading a run: its settings, the steps of its checkpoints, its base, its export, and its training rows."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from efx_jax.config import Config
from efx_jax.config_io import read_config
from efx_jax.data.batches import Batch, calibration_batches, up_to_multiple
from efx_jax.data.tasks import load_data
from efx_jax.data.tokens import tokenize
from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.hf import load_pretrained, load_tokenizer

_MULTIPLE = 32  # calibration_batches rounds lengths up to a multiple of this


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that `train.py` has written: its settings, and the steps for which it has a checkpoint, ascending.

    `kind` is the folder of those checkpoints: "checkpoints", or "best" for that of `eval.best`.
    """

    folder: Path
    config: Config
    steps: tuple[int, ...]
    kind: str = "checkpoints"

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


def open_run(folder: Path) -> Run:
    """Reads a run's settings and checkpoint steps, but no arrays yet.

    Raises:
        InputError: not a run, or settings that this version does not know.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: is not a run; expected a folder that train.py has written, with config.yaml")
    config = read_config(path)
    return Run(folder, config, _steps(folder / "checkpoints"))


def held_steps(run: Run) -> tuple[int, ...]:
    """The steps of a run's checkpoints, at least one.

    Raises:
        InputError: it holds none.
    """
    if not run.steps:
        raise InputError(
            f"{run.folder}: holds no checkpoint; expected one in {run.folder / 'checkpoints'}; train it first"
        )
    return run.steps


def choose_step(run: Run, asked: tuple[int, ...]) -> int:
    """The step to look at if only one is needed: the last requested one, else the run's last checkpoint.

    Raises:
        InputError: no checkpoint, or none at that step.
    """
    held = held_steps(run)
    step = max(asked, default=held[-1])
    if step not in held:
        raise InputError(
            f"{run.folder}: no checkpoint of step {step}; expected among {listed(held)}; train with a larger train.keep"
        )
    return step


def open_shipped(folder: Path) -> Run:
    """The run with only the checkpoint whose model it exports: its best, if `eval.best` has found one, or its last.

    Raises:
        InputError: as in `open_run`.
    """
    run = open_run(folder)
    best = _steps(folder / "best") if run.config.eval.best else ()
    if best:
        return dataclasses.replace(run, steps=best[-1:], kind="best")
    return dataclasses.replace(run, steps=held_steps(run)[-1:])


def load_export(run: Run) -> dict[str, Any]:
    """The stacked weights of the run's export, name -> `[L,...]`, each in its own dtype.

    Raises:
        InputError: the run is not finished.
    """
    folder = run.folder / "export"
    if not (folder / "config.json").is_file():
        raise InputError(f"{run.folder}: holds no export; expected {folder}; let the run come to its end")
    return load_pretrained(folder, None)[0]["layers"]


def load_base(run: Run) -> tuple[dict[str, Any], ModelSpec]:
    """The model that the run started from, in the dtype that it was trained in, since changes from rounding to that
    dtype are not the run's doing."""
    model = run.config.model
    return load_pretrained(model.path, None if model.dtype == "keep" else model.dtype)


def training_rows(run: Run, spec: ModelSpec, rows: int, length: int) -> Batch:
    """Some of the run's training sequences as one right-padded batch, the longest first.

    Args:
        run: the run.
        spec: the model.
        rows: number of sequences, drawn with the run's seed; all if there are fewer.
        length: maximum tokens of each.

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
    room = rows * up_to_multiple(length, _MULTIPLE)
    batch = next(calibration_batches(sequences, config.seed, rows, length, room))
    filled = batch["lengths"] > 0
    return {"tokens": batch["tokens"][filled], "lengths": batch["lengths"][filled]}


def split_rows(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches, each of every other row, with similar lengths.

    Raises:
        InputError: a single row.
    """
    if len(batch["lengths"]) < 2:
        raise InputError("the run's training rows: expected two or more, one of them held out, found one")
    return tuple({name: values[start::2] for name, values in batch.items()} for start in (0, 1))  # type: ignore[return-value]


def first_and_last(steps: Iterable[int]) -> list[int]:
    """The first and last of some steps, or the only one."""
    found = sorted(steps)
    return sorted({found[0], found[-1]})


def _steps(folder: Path) -> tuple[int, ...]:
    # An incomplete checkpoint has a name with a suffix.
    names = [entry.name for entry in folder.glob("*") if (entry / "state").is_dir()]
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def listed(steps: tuple[int, ...]) -> str:
    """Steps as text for a message."""
    return ", ".join(map(str, steps))
