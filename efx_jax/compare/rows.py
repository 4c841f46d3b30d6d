"""The rows of a comparison's table: each holds the seeds of a method on a schedule at one value of every axis."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

from efx_jax.compare.records import CellRecord


@dataclasses.dataclass(frozen=True)
class Row:
    """The seeds of a method on a schedule at one value of every axis; `asked` is the requested sparsity."""

    method: str
    schedule: str
    axes: tuple[Any, ...]
    asked: float
    records: tuple[CellRecord, ...]


def spread(row: Row, key: str) -> dict[str, Any]:
    """A metric over the seeds of a row that have it: values, mean, standard deviation (divided by n - 1), interval.

    The mean is None if a value is not finite, and the standard deviation also if there is only one value. The interval
    is that of the evaluation, and None if there are several values.
    """
    values = [record.metrics[key] for record in row.records if key in record.metrics]
    numbers = [value for value in values if value is not None]
    is_finite = len(numbers) == len(values) > 0
    intervals = [record.intervals.get(key) for record in row.records if key in record.metrics]
    return {
        "mean": statistics.fmean(numbers) if is_finite else None,
        "std": statistics.stdev(numbers) if is_finite and len(numbers) > 1 else None,
        "interval": intervals[0] if len(intervals) == 1 else None,
        "values": values,
    }


def group_rows(records: Iterable[CellRecord]) -> list[Row]:
    """The rows, in the order of their first cells."""
    groups: dict[tuple[str, str, tuple[Any, ...], float], list[CellRecord]] = {}
    for record in records:
        cell = record.cell
        groups.setdefault((cell.method, cell.schedule, cell.axes, cell.config.prune.sparsity), []).append(record)
    return [
        Row(method, schedule, axes, asked, tuple(found)) for (method, schedule, axes, asked), found in groups.items()
    ]


def metric_keys(records: Iterable[CellRecord]) -> list[str]:
    """All metrics that any record has, in order of first appearance."""
    return list(dict.fromkeys(key for record in records for key in record.metrics))
