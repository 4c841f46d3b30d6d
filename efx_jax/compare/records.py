"""The results of a cell, read from the files of its run and of its evaluations."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.analysis.wording import share_gone
from efx_jax.compare.grid import Cell
from efx_jax.compare.paired import Windows
from efx_jax.compare.settings import Comparison
from efx_jax.compare.work import is_finished, measurements
from efx_jax.errors import InputError
from efx_jax.evaluation.relative import check_pairs, check_ratios, read_evaluation, relative
from efx_jax.evaluation.results import TITLES
from efx_jax.files import read_text

Metrics = dict[str, float | None]
Intervals = dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class CellRecord:
    """A cell's numbers.

    Attributes:
        cell: the cell.
        metrics: "sparsity", "train_seconds", "event_seconds", "peak_memory_mib", "tokens", "perplexity.TEXT",
            "PROTOCOL.TASK.METRIC" and "PROTOCOL.relative", as far as available; None is a value that is not finite.
        intervals: 95 % bootstrap intervals of the metrics for which the evaluation gives one.
        is_whole: whether nothing is missing.
        note: why Rel.% is missing where it could be expected, or "".
        windows: by text, the nats and predicted tokens of every window.
    """

    cell: Cell
    metrics: Metrics
    intervals: Intervals
    is_whole: bool
    note: str
    windows: Mapping[str, Windows] = dataclasses.field(default_factory=dict)


def read_record(comparison: Comparison, cell: Cell, runs: Path) -> CellRecord:
    """The numbers of a cell so far; none before its run is finished."""
    run = runs / cell.run
    if cell.refusal or not is_finished(run):
        return CellRecord(cell, {}, {}, False, "")
    asked = measurements(comparison, cell)
    metrics, intervals = _run_metrics(cell, run), Intervals()
    windows: dict[str, Windows] = {}
    notes = []
    for measurement in asked:
        folder, name = measurement.folder(run), measurement.name
        if not is_finished(folder):
            continue
        if measurement.is_text:
            text = _read(folder)["perplexity"]
            _take(metrics, intervals, f"perplexity.{name}", text, "value", "interval")
            # Evaluations from before windows were recorded have none; a ruined model's values are not finite.
            if None not in text.get("window_nll", [None]):
                counts = np.asarray(text["window_tokens"])
                windows[name] = Windows(np.asarray(text["window_nll"]), counts, text.get("text", ""))
            continue
        for task, result in _read(folder)["tasks"].items():
            for metric in TITLES:
                if metric in result:
                    _take(metrics, intervals, f"{name}.{task}.{metric}", result, metric, f"{metric}_interval")
        dense = measurement.folder(runs / cell.reference)
        if cell.reference and not is_finished(dense):
            notes.append(f"{cell.reference}, the dense run, is not measured under {name} yet")
        elif cell.reference:
            found = _relative(folder, dense)
            if isinstance(found, str):
                notes.append(found)
            else:
                _take(metrics, intervals, f"{name}.relative", found, "value", "interval")
    is_whole = all(is_finished(each.folder(run)) for each in asked)
    return CellRecord(cell, metrics, intervals, is_whole, "; ".join(notes), windows)


def _take(metrics: Metrics, intervals: Intervals, key: str, found: Mapping[str, Any], value: str, ends: str) -> None:
    """Copies a number and, if it has both ends, its interval."""
    metrics[key] = found[value]
    low, high = found.get(ends) or (None, None)
    if low is not None and high is not None:
        intervals[key] = (low, high)


def _run_metrics(cell: Cell, run: Path) -> Metrics:
    summary = _read(run)
    return {
        "sparsity": share_gone(cell.config, summary),
        "train_seconds": summary["seconds"].get("train", 0.0),
        "event_seconds": summary["seconds"].get("prune", 0.0),
        "peak_memory_mib": summary["peak_memory_mib"],
        "tokens": summary["tokens"],
    }


def _relative(folder: Path, dense: Path) -> Mapping[str, Any] | str:
    """Rel.% with its interval, or why there is none."""
    try:
        found, reference = read_evaluation(folder), read_evaluation(dense)
        check_pairs(found[0], reference[0], dense)
        check_ratios(*reference, dense)
        return relative(*found, *reference)
    except InputError as error:
        return str(error)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: is garbled ({error}); remove {folder}, and it is made again") from error
    return summary
