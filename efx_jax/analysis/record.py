"""What a finished run has left on disk, without its weights: settings, summary, metrics, evaluations and samples."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from efx_jax.config import Config
from efx_jax.config_io import from_yaml
from efx_jax.errors import InputError
from efx_jax.files import read_text

Row = dict[str, Any]

HELD_OUT = "held-out rows"
"""The task of samples.jsonl that is none: prompts of held-out rows, in a run that scores no task."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's files, read: `metrics`, `evaluations` and `samples` are lists of lines, empty where there is no file."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[Row]
    evaluations: list[Row]
    samples: list[Row]


def read_record(folder: Path) -> Record:
    """Reads a finished run.

    Raises:
        InputError: no run, one that is not finished, or a file that is damaged.
    """
    settings, summary = folder / "config.yaml", folder / "summary.json"
    if not settings.is_file():
        raise InputError(f"{folder}: is not a run; expected a folder that train.py has written, with config.yaml")
    if not summary.is_file():
        raise InputError(f"{folder}: the run is not finished; expected summary.json; give the same command again")
    return Record(
        folder=folder,
        config=from_yaml(read_text(settings), str(settings)),
        summary=_parsed(read_text(summary), f"{summary}"),
        metrics=_lines(folder / "metrics.jsonl"),
        evaluations=_lines(folder / "evaluations.jsonl"),
        samples=_lines(folder / "samples.jsonl"),
    )


def _lines(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    # Not splitlines: a prompt may hold other line breaks, which JSON leaves as they are.
    lines = read_text(path).split("\n")
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line]


def _parsed(text: str, where: str) -> Row:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON ({error}); restore the file or train again") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{where}: holds a {type(found).__name__}, expected an object; restore the file or train again"
        )
    return found
