"""What a cell has brought, read from the files of its run and of its evaluations."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from efx_jax.compare.grid import Cell
from efx_jax.compare.settings import Comparison
from efx_jax.compare.work import is_finished, measurements
from efx_jax.errors import InputError
from efx_jax.evaluation.relative import check_pairs, check_zeros, relative_value
from efx_jax.evaluation.results import TITLES
from efx_jax.model.spec import linear_shapes
from efx_jax.weights.shapes import find_spec

Metrics = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Record:
    """A cell's numbers.

    Attributes:
        cell: the cell.
        metrics: "sparsity", "train_seconds", "event_seconds", "peak_memory_mib", "tokens", "perplexity.TEXT",
            "PROTOCOL.TASK.METRIC" and "PROTOCOL.relative", as far as they are there; None is not finite.
        is_whole: whether nothing is missing.
        note: why Rel.% is missing where it could be expected, or "".
    """

    cell: Cell
    metrics: Metrics
    is_whole: bool
    note: str


def read_record(comparison: Comparison, cell: Cell, runs: Path) -> Record:
    """The numbers of a cell so far; none before its run is finished."""
    run = runs / cell.run
    if cell.refusal or not is_finished(run):
        return Record(cell, {}, False, "")
    asked = measurements(comparison, cell)
    metrics = _run_metrics(cell, run)
    notes = []
    for measurement in asked:
        folder = measurement.folder(run)
        if not is_finished(folder):
            continue
        summary = _read(folder)
        if measurement.is_text:
            metrics[f"perplexity.{measurement.name}"] = summary["perplexity"]["value"]
            continue
        for task, result in summary["tasks"].items():
            metrics |= {f"{measurement.name}.{task}.{name}": result[name] for name in TITLES if name in result}
        dense = measurement.folder(runs / cell.reference)
        if cell.reference and is_finished(dense):
            relative = _relative(summary["tasks"], dense)
            if isinstance(relative, str):
                notes.append(relative)
            else:
                metrics[f"{measurement.name}.relative"] = relative
    return Record(cell, metrics, all(is_finished(each.folder(run)) for each in asked), "; ".join(notes))


def _run_metrics(cell: Cell, run: Path) -> Metrics:
    summary = _read(run)
    return {
        "sparsity": _real_sparsity(cell, run, summary["sparsity"]),
        "train_seconds": summary["seconds"]["train"],
        "event_seconds": summary["seconds"].get("prune", 0.0),
        "peak_memory_mib": summary["peak_memory_mib"],
        "tokens": summary["tokens"],
    }


def _real_sparsity(cell: Cell, run: Path, found: dict[str, list[float]]) -> float:
    """Share of exact zeros among all entries of the pruned matrices of the export."""
    shapes = linear_shapes(find_spec(run).spec)
    sizes = {name: shapes[name][0] * shapes[name][1] for name in cell.config.prune.targets}
    zeros = sum(size * sum(found[name]) for name, size in sizes.items())
    return zeros / sum(size * len(found[name]) for name, size in sizes.items())


def _relative(found: dict[str, Any], dense: Path) -> float | str:
    """Rel.%, or why there is none."""
    reference = _read(dense)["tasks"]
    try:
        check_pairs(found, reference, dense)
        check_zeros(reference, dense)
    except InputError as error:
        return str(error)
    return relative_value(found, reference)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: is garbled ({error}); remove {folder}, and it is made again") from error
    return summary
