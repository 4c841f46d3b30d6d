"""What a finished run has left on disk, except its weights: settings, summary, metrics, evaluations and samples."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efx_jax.config import Config
from efx_jax.config_io import read_config
from efx_jax.errors import InputError
from efx_jax.files import read_text

Row = dict[str, Any]

_SUMMARY = (
    "results",
    "data",
    "steps",
    "tokens",
    "seed",
    "seconds",
    "versions",
    "sparsity",
    "entries",
    "peak_memory_mib",
)

HELD_OUT = "held-out rows"
"""The task name in samples.jsonl that is not a task: prompts of held-out rows, in a run that scores no task."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run's files: `metrics`, `evaluations` and `samples` are lists of lines, empty if no file."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    samples: list[Row]


def read_record(folder: Path) -> RunRecord:
    """Reads a finished run.

    Raises:
        InputError: not a run, one that is not finished, or a damaged file.
    """
    settings, summary = folder / "config.yaml", folder / "summary.json"
    if not settings.is_file():
        raise InputError(f"{folder}: is not a run; expected a folder that train.py has written, with config.yaml")
    if not summary.is_file():
        raise InputError(f"{folder}: the run is not finished; expected summary.json; give the same command again")
    return RunRecord(
        folder=folder,
        config=read_config(settings),
        summary=_parsed(read_text(summary), f"{summary}", _SUMMARY),
        metrics=_lines(folder / "metrics.jsonl", ("step",)),
        evaluations=_lines(folder / "evaluations.jsonl", ("step",)),
        samples=_lines(folder / "samples.jsonl", ("task", "row", "prompt", "gold", "answers")),
    )


def _lines(path: Path, names: Sequence[str]) -> list[Row]:
    if not path.is_file():
        return []
    # Not splitlines: a prompt may contain other line breaks, which JSON does not escape.
    lines = read_text(path).split("\n")
    return [_parsed(line, f"{path}:{number}", names) for number, line in enumerate(lines, start=1) if line]


def _parsed(text: str, where: str, names: Sequence[str]) -> Row:
    """An object that has these names; numbers that are not finite are None, as `log.append_row` writes them."""
    try:
        found = json.loads(text, parse_constant=lambda _: None)
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON ({error}); restore the file or train again") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{where}: holds a {type(found).__name__}, expected an object; restore the file or train again"
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"{where}: holds no {', '.join(missing)}; restore the file or train again")
    return found
