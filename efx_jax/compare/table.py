"""One row per method, schedule and value of the axes: the mean over seeds, as Markdown, CSV and JSON."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.compare.grid import axis_text
from efx_jax.compare.records import CellRecord
from efx_jax.compare.rows import Row, group_rows, metric_keys, spread
from efx_jax.compare.settings import Comparison
from efx_jax.compare.side_by_side import Ratio, ratios
from efx_jax.evaluation.results import TITLES, markdown_table
from efx_jax.files import atomic_write


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric, its heading, the factor it is multiplied by and its decimals."""

    key: str
    title: str
    factor: float = 1.0
    decimals: int = 2


_COSTS = (
    Column("train_seconds", "training s", decimals=1),
    Column("event_seconds", "events s", decimals=1),
    Column("peak_memory_mib", "peak MiB", decimals=0),
    Column("tokens", "tokens", decimals=0),
)
_SPARSITY = Column("sparsity", "pruned %", 100)


def write_tables(
    comparison: Comparison,
    records: Sequence[CellRecord],
    failures: Mapping[str, str],
    figures: Mapping[str, str],
    folder: Path,
) -> str:
    """Writes table.md, table.csv and table.json (means over seeds), runs.csv and runs.json (every seed).

    Args:
        comparison: defines the columns.
        records: the records of all cells.
        failures: by run, why it or its evaluation has failed this time.
        figures: by name, why it is not drawn, or "".
        folder: output folder; created if needed.

    Returns:
        The Markdown.

    Raises:
        InputError: the disk is full or the folder is not writable.
    """
    rows = group_rows(records)
    beside = ratios(comparison, rows)
    markdown = _markdown(comparison, rows, beside, records, failures, figures)
    keys = metric_keys(records)
    axes = list(comparison.axes)
    ended = {key: any(key in record.intervals for record in records) for key in keys}
    atomic_write(folder / "runs.csv", _csv(_run_line(axes, record, failures, ended) for record in records))
    atomic_write(folder / "runs.json", _json([_run_entry(axes, record, failures) for record in records]))
    atomic_write(folder / "table.csv", _csv(_row_line(axes, row, keys) for row in rows))
    entries = [
        _row_entry(axes, row) | {"ratios": {key: dataclasses.asdict(ratio) for key, ratio in found.items()}}
        for row, found in zip(rows, beside, strict=True)
    ]
    atomic_write(folder / "table.json", _json(entries))
    atomic_write(folder / "table.md", markdown)
    return markdown


def _markdown(
    comparison: Comparison,
    rows: Sequence[Row],
    beside: Sequence[Mapping[str, Ratio]],
    records: Sequence[CellRecord],
    failures: Mapping[str, str],
    figures: Mapping[str, str],
) -> str:
    texts = [metric_column(f"perplexity.{name}") for name in comparison.texts]
    protocols = comparison.evaluate.protocols if comparison.evaluate.tasks else ()
    tables: dict[str, list[Column]] = {name: [*texts, *_task_columns(records, name)] for name in protocols}
    seen = [row for row in rows if any(record.metrics for record in row.records)]
    parts = [f"# {comparison.name}", _legend(comparison)]
    for title, columns in (tables or {"perplexity": texts}).items():
        parts += [f"## {title}", _table(comparison, seen, [_SPARSITY, *columns])]
    parts += _side_by_side(comparison, rows, beside)
    parts += ["## Cost", _table(comparison, seen, _COSTS), *_pictures(figures), *_missing(records, failures, figures)]
    return "\n\n".join(parts) + "\n"


def _side_by_side(comparison: Comparison, rows: Sequence[Row], beside: Sequence[Mapping[str, Ratio]]) -> list[str]:
    """Every row's perplexity divided by that of dense LoRA and by that of its best rival."""
    keys = list(dict.fromkeys(key for found in beside for key in found))
    if not keys:
        return []
    places = _varied_places(comparison)
    header = ["method", "schedule", *(list(comparison.axes)[place] for place in places), "asked %", *keys]
    lines = [
        [*_place(row, places), *(found[key].text if key in found else "" for key in keys)]
        for row, found in zip(rows, beside, strict=True)
        if found
    ]
    legend = (
        "Perplexity over another's on the same windows [95 %, paired: both see the same resample of windows; of "
        "several seeds also Student's t over seeds]. The best other is the row of the lowest perplexity on these "
        "windows at the same sparsity, N:M pattern and axes (as far as an axis has a say in both), be it another "
        "schedule of the same method; chosen on the windows of the comparison, it looks a little better than it is."
    )
    return ["## Side by side", legend, markdown_table(header, lines)]


def _varied_places(comparison: Comparison) -> list[int]:
    """Positions of the axes that have a column here; the sparsity has its own column."""
    return [place for place, key in enumerate(comparison.axes) if key != "prune.sparsity"]


def _place(row: Row, places: Sequence[int]) -> list[str]:
    """The first cells of a table row."""
    axes = ["" if row.axes[place] is None else axis_text(row.axes[place]) for place in places]
    return [row.method, row.schedule, *axes, f"{100 * row.asked:g}"]


def _legend(comparison: Comparison) -> str:
    parts = []
    if len(comparison.seeds) > 1:
        seeds = ", ".join(map(str, comparison.seeds))
        parts.append(f"Mean ± standard deviation over the seeds {seeds}; (n) where only n of them are there.")
    else:
        parts.append("In brackets: 95 % bootstrap intervals over the rows or windows that are scored.")
    if comparison.reference:
        parts.append(f"Rel. % refers to {comparison.reference} of the same seed.")
    parts.append("Seconds of training are those of its updates, compilation included; those of events come on top.")
    return " ".join(parts)


def metric_column(key: str) -> Column:
    """The column that shows a metric of a record."""
    group, _, name = key.partition(".")
    if not name:
        return next(column for column in (_SPARSITY, *_COSTS) if column.key == key)
    if group == "perplexity":
        return Column(key, f"{name} perplexity")
    task, _, metric = name.rpartition(".")
    return Column(key, f"{task} {TITLES[metric]}", 100) if task else Column(key, "Rel. %")


def _task_columns(records: Sequence[CellRecord], protocol: str) -> list[Column]:
    keys = [key for key in metric_keys(records) if key.startswith(f"{protocol}.")]
    # The one over all tasks comes last.
    return [metric_column(key) for key in sorted(keys, key=lambda key: key == f"{protocol}.relative")]


def _table(comparison: Comparison, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    places = _varied_places(comparison)
    varied = [list(comparison.axes)[place] for place in places]
    header = ["method", "schedule", *varied, "asked %", *(column.title for column in columns)]
    lines = []
    for row in rows:
        cells = [_cell(row, column, len(comparison.seeds)) for column in columns]
        lines.append([*_place(row, places), *cells])
    return markdown_table(header, lines)


def _cell(row: Row, column: Column, seeds: int) -> str:
    found = spread(row, column.key)
    if not found["values"]:
        return ""
    count = f" ({len(found['values'])})" if len(found["values"]) < seeds else ""
    if found["mean"] is None:
        return f"not finite{count}"
    text = f"{column.factor * found['mean']:,.{column.decimals}f}"
    if found["std"] is not None:
        text += f" ± {column.factor * found['std']:,.{column.decimals}f}"
    elif found["interval"] and seeds == 1:
        text += f" [{', '.join(f'{column.factor * end:,.{column.decimals}f}' for end in found['interval'])}]"
    return text + count


def _pictures(figures: Mapping[str, str]) -> list[str]:
    lines = [
        f"![{name}](figures/{name}.png)\n\nIts numbers: [{name}.csv](figures/{name}.csv)"
        for name, reason in figures.items()
        if not reason
    ]
    return ["## Figures", *lines] if lines else []


def _missing(records: Sequence[CellRecord], failures: Mapping[str, str], figures: Mapping[str, str]) -> list[str]:
    """What is not in the tables, and why; runs still to be done are only counted."""
    waiting = sum(_status(record, failures) == "missing" for record in records)
    lines = [f"{waiting} of {len(records)} runs are not there, or not measured in full."] if waiting else []
    lines += _told("failed", [(record, _failure(record, failures)) for record in records])
    lines += _told("impossible", [(record, record.cell.refusal) for record in records])
    lines += _told("no Rel. %", [(record, record.note) for record in records])
    lines += [f"no figure {name}: {reason}" for name, reason in figures.items() if reason]
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _told(what: str, reasons: Iterable[tuple[CellRecord, str]]) -> list[str]:
    """A line per reason, with the first cell that it applies to: it is mostly the same for all seeds."""
    titles: dict[str, str] = {}
    for record, reason in reasons:
        if reason:
            titles.setdefault(reason, record.cell.title)
    return [f"{what}: {title}: {reason}" for reason, title in titles.items()]


def _status(record: CellRecord, failures: Mapping[str, str]) -> str:
    if record.cell.refusal:
        return "refused"
    if record.is_whole:  # also where another process has finished what had failed here
        return "done"
    return "failed" if record.cell.run in failures else "missing"


def _reason(record: CellRecord, failures: Mapping[str, str]) -> str:
    return record.cell.refusal or _failure(record, failures) or record.note


def _failure(record: CellRecord, failures: Mapping[str, str]) -> str:
    return "" if record.is_whole else failures.get(record.cell.run, "")


def _run_entry(axes: Sequence[str], record: CellRecord, failures: Mapping[str, str]) -> dict[str, Any]:
    cell = record.cell
    return {
        "method": cell.method,
        "schedule": cell.schedule,
        "axes": dict(zip(axes, cell.axes, strict=True)),
        "seed": cell.seed,
        "asked_sparsity": cell.config.prune.sparsity,
        "run": cell.run,
        "status": _status(record, failures),
        "reason": _reason(record, failures),
        "metrics": record.metrics,
        "intervals": record.intervals,
    }


def _row_entry(axes: Sequence[str], row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "schedule": row.schedule,
        "axes": dict(zip(axes, row.axes, strict=True)),
        "seeds": [record.cell.seed for record in row.records],
        "asked_sparsity": row.asked,
        "metrics": {key: spread(row, key) for key in metric_keys(row.records)},
    }


def _run_line(
    axes: Sequence[str], record: CellRecord, failures: Mapping[str, str], keys: Mapping[str, bool]
) -> dict[str, Any]:
    """A line of runs.csv; `keys` says for every metric whether it has intervals."""
    entry = _run_entry(axes, record, failures)
    metrics, intervals = entry.pop("metrics"), entry.pop("intervals")
    line = entry | entry.pop("axes")
    for key, has_interval in keys.items():
        line[key] = metrics.get(key)
        if has_interval:
            line[f"{key}_low"], line[f"{key}_high"] = intervals.get(key, (None, None))
    return line


def _row_line(axes: Sequence[str], row: Row, keys: Sequence[str]) -> dict[str, Any]:
    entry = _row_entry(axes, row)
    line = {name: entry[name] for name in ("method", "schedule", "asked_sparsity")} | entry["axes"]
    line["seeds"] = sum(bool(record.metrics) for record in row.records)
    for key, which in itertools.product(keys, ("mean", "std")):
        line[key if which == "mean" else f"{key}_std"] = spread(row, key)[which]
    return line


def _csv(lines: Iterable[Mapping[str, Any]]) -> str:
    rows = list(lines)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
