"""The figures that a comparison requests, from the rows of its table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis.plots import (
    Figure,
    HeatMap,
    Level,
    Place,
    Series,
    draw_bars,
    draw_heat_map,
    draw_lines,
    draw_points,
    places_of,
)
from efx_jax.compare.grid import axis_text
from efx_jax.compare.records import CellRecord
from efx_jax.compare.rows import Row, group_rows, metric_keys, spread
from efx_jax.compare.settings import Comparison, Drawing
from efx_jax.compare.table import Column, metric_column
from efx_jax.errors import InputError

_Parts = Mapping[str, Any]
"""What distinguishes rows: method, schedule and the values of the axes; None where a row has no value."""
_Point = tuple[Place, float, tuple[float, float] | None]


def draw_figures(comparison: Comparison, records: Sequence[CellRecord], folder: Path) -> dict[str, str]:
    """Draws every figure from the runs available so far, as NAME.png and NAME.csv.

    Args:
        comparison: defines the figures.
        records: the records of all cells.
        folder: output folder; created if needed.

    Returns:
        By figure name, why it is not drawn, in one line, or "".
    """
    reasons = {}
    for name, drawing in comparison.figures.items():
        try:
            _draw(folder / name, drawing.kind, build_figure(comparison, drawing, records))
            reasons[name] = ""
        except InputError as error:
            reasons[name] = str(error)
    return reasons


def _draw(path: Path, kind: str, figure: Figure) -> None:
    if kind == "heat_map":
        draw_heat_map(path, _heat_map(figure))
    else:
        {"lines": draw_lines, "bars": draw_bars, "points": draw_points}[kind](path, figure)


def _heat_map(figure: Figure) -> HeatMap:
    """A row per series, a column per place; levels, which have no place, are given in the title."""
    places = places_of(figure)
    values = [dict(zip(series.x, series.y, strict=True)) for series in figure.series]
    levels = [f"{level.label} {level.y:,.4g}" for level in figure.levels]
    return HeatMap(
        title="\n".join([figure.title, *([", ".join(levels)] if levels else [])]),
        x_label=figure.x_label,
        y_label="",
        value_label=figure.y_label,
        rows=tuple(series.label for series in figure.series),
        columns=tuple(axis_text(place) for place in places),
        values=tuple(tuple(found.get(place) for place in places) for found in values),
    )


def build_figure(comparison: Comparison, drawing: Drawing, records: Sequence[CellRecord]) -> Figure:
    """What is to be drawn: a series per method, schedule and value of any other axis that varies.

    If any row has several seeds, means with standard deviations; otherwise values with their intervals, if they have
    one, so that error bars mean the same throughout a figure. A figure of points shows all seeds. A method that does
    not prune has no schedule and no value on axes in the section `prune`, and one without a teacher has none on axes in
    `distill`; if that leaves it without a place on the x axis, it is drawn as a level.

    Raises:
        InputError: no run with this metric is available yet.
    """
    column = metric_column(drawing.y)
    rows = [(row, _parts(comparison, row)) for row in sorted(group_rows(records), key=_order_of(comparison))]
    shown = [(row, parts) for row, parts in rows if _is_shown(drawing, parts)]
    measured = [(row, parts) for row, parts in shown if spread(row, drawing.y)["mean"] is not None]
    placed = [(row, parts) for row, parts in measured if _has_place(drawing, parts)]
    if not placed:
        raise InputError(_absence(drawing, [row for row, _ in shown]))
    others = [key for key in _parts(comparison, placed[0][0]) if key != drawing.x]
    varied = [key for key in others if len({parts[key] for _, parts in measured} - {None}) > 1]
    seeds = max(len(spread(row, drawing.y)["values"]) for row, _ in measured)
    points: dict[str, list[_Point]] = {}
    for row, parts in placed:
        place = _place(drawing.x, parts[drawing.x])
        points.setdefault(_label(parts, others, varied), []).extend(_points(drawing, column, row, place, seeds))
    levels = [
        _level(column, row, _label(parts, others, varied), seeds)
        for row, parts in measured
        if not _has_place(drawing, parts)
    ]
    return Figure(
        title="\n".join([_title(comparison, drawing, column, placed, varied), _legend(drawing, measured, seeds)]),
        x_label=f"{drawing.x} (%)" if drawing.x == "prune.sparsity" else drawing.x,
        y_label=column.title,
        series=tuple(_series(label, found, drawing.kind) for label, found in points.items()),
        levels=tuple(levels),
        places=tuple(_place(drawing.x, value) for value in _values(comparison, drawing.x)),
    )


def _order_of(comparison: Comparison) -> Callable[[Row], tuple[int, int]]:
    """A sort key that keeps methods and schedules in the file's order, whichever is finished first."""
    methods, schedules = list(comparison.methods), ["", *comparison.schedules]
    return lambda row: (methods.index(row.method), schedules.index(row.schedule))


def _values(comparison: Comparison, x: str) -> Iterable[Any]:
    """All values of an axis, "method" or "schedule", in the order of the file."""
    return comparison.axes.get(x, comparison.methods if x == "method" else comparison.schedules)


def _parts(comparison: Comparison, row: Row) -> dict[str, Any]:
    axes = dict(zip(comparison.axes, row.axes, strict=True))
    return {"method": row.method, "schedule": row.schedule or None, **axes}


def _is_shown(drawing: Drawing, parts: _Parts) -> bool:
    return all(parts[key] is None or parts[key] in chosen for key, chosen in drawing.only.items())


def _has_place(drawing: Drawing, parts: _Parts) -> bool:
    # Next to methods with schedules, a method without one is what they are compared with.
    return parts["schedule" if drawing.x == "method" else drawing.x] is not None


def _absence(drawing: Drawing, rows: Sequence[Row]) -> str:
    """Why there is nothing to draw."""
    records = [record for row in rows for record in row.records]
    if any(drawing.y in record.metrics for record in records):
        return f"no run has a finite {drawing.y}"
    if any(record.is_whole for record in records):
        return f"no run has {drawing.y}; they have {', '.join(metric_keys(records))}"
    return "none of its runs is there yet"


def _label(parts: _Parts, others: Iterable[str], varied: Sequence[str]) -> str:
    """What distinguishes a series: always its method, unless that is the x axis, and whatever varies."""
    by_method = "method" in others or parts["schedule"] is None
    told = [key for key in parts if key in varied or (key == "method" and by_method)] or ["schedule"]
    texts = {key: axis_text(parts[key]) for key in told if parts[key] is not None}
    return ", ".join(
        text if key in ("method", "schedule") else f"{key.rpartition('.')[2]} {text}" for key, text in texts.items()
    )


def _place(axis: str, value: Any) -> Place:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return round(100.0 * value, 9) if axis == "prune.sparsity" else value
    return axis_text(value)


def _points(drawing: Drawing, column: Column, row: Row, place: Place, seeds: int) -> list[_Point]:
    if drawing.kind == "points":
        values = spread(row, drawing.y)["values"]
        return [(place, column.factor * value, None) for value in values]
    level = _level(column, row, "", seeds)
    return [(place, level.y, None if level.low is None or level.high is None else (level.low, level.high))]


def _level(column: Column, row: Row, label: str, seeds: int) -> Level:
    """The mean of a row, with its standard deviation or, if `seeds` (the most of any row) is 1, its interval."""
    found = spread(row, column.key)
    mean, deviation, ends = found["mean"], found["std"], found["interval"] if seeds == 1 else None
    if deviation is not None:
        ends = (mean - deviation, mean + deviation)
    low, high = (column.factor * end for end in ends) if ends else (None, None)
    return Level(label, column.factor * mean, low, high)


def _series(label: str, points: Sequence[_Point], kind: str) -> Series:
    if kind == "lines" and not any(isinstance(place, str) for place, _, _ in points):
        points = sorted(points, key=lambda point: point[0])
    x, y, ends = zip(*points, strict=True)
    if not any(ends):
        return Series(label, x, y)
    # A value without an interval gets one of zero length.
    low, high = zip(*(each or (value, value) for value, each in zip(y, ends, strict=True)), strict=True)
    return Series(label, x, y, low, high)


def _title(
    comparison: Comparison,
    drawing: Drawing,
    column: Column,
    placed: Sequence[tuple[Row, _Parts]],
    varied: Sequence[str],
) -> str:
    """What is drawn, and the values of the axes that do not vary."""
    alike = [key for key in comparison.axes if key not in (drawing.x, *varied)]
    fixed = {key: parts[key] for key in alike for _, parts in placed if parts[key] is not None}
    told = [f"{key} {axis_text(value)}" for key, value in fixed.items()]
    return ", ".join([f"{comparison.name}: {column.title}", *told])


def _legend(drawing: Drawing, measured: Sequence[tuple[Row, _Parts]], seeds: int) -> str:
    """What markers and error bars stand for."""
    if drawing.kind == "points":
        return f"all seeds, up to {seeds} of each, and their median"
    if drawing.kind == "heat_map":
        return f"mean over up to {seeds} seeds" if seeds > 1 else "one seed"
    if seeds > 1:
        return f"mean ± standard deviation over up to {seeds} seeds"
    has_ends = any(spread(row, drawing.y)["interval"] for row, _ in measured)
    return "one seed, 95 % bootstrap intervals" if has_ends else "one seed"
