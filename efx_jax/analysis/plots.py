"""Figures as a pair of files: PATH.png, and PATH.csv with exactly the numbers that are drawn."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_jax.analysis.canvas import (
    SMALL,
    TEXT,
    is_wide,
    legend_name,
    make_logarithmic,
    mark_decades,
    name_places,
    new_canvas,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "oooo")
_FEW = 8
"""Up to this many distinct values of x each get their own tick; a longer line gets about this many markers."""

Place = float | str
"""The position of a value on the x axis: a number, or the name of a group."""


@dataclasses.dataclass(frozen=True)
class Series:
    """Values under one name; `low` and `high` are the ends of their error bars, in the unit of y, or None.

    In `draw_points` a place may occur again with another value.
    """

    label: str
    x: tuple[Place, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Level:
    """A value without a place on the x axis, such as the dense model's: a horizontal line, and a band around it."""

    label: str
    y: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """Series and levels over one pair of axes; the labels name what is drawn and its unit.

    `places` is the order of places that are not numbers; without it they appear as encountered. An x axis whose numbers
    span more than a decade is logarithmic, unless `is_linear`.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    places: tuple[Place, ...] = ()
    is_linear: bool = False


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """`values[row][column]`, each drawn as a coloured cell; None for an empty cell."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def draw_lines(path: Path, figure: Figure) -> None:
    """A line with markers per series; places that are not numbers are put side by side.

    Args:
        path: without a suffix.
        figure: what to draw.

    Raises:
        InputError: matplotlib is not installed, the disk is full or the folder is not writable.
        ValueError: nothing to draw, lengths that differ, or a number that is not finite.
    """
    _draw(path, figure, _draw_lines)


def draw_bars(path: Path, figure: Figure) -> None:
    """A group of bars per place, with one bar per series; arguments and errors as in `draw_lines`."""
    _draw(path, figure, _draw_bars)


def draw_points(path: Path, figure: Figure) -> None:
    """Single values side by side at each place, and a line at their median; arguments and errors as in `draw_lines`.

    Meant for many seeds of the same thing.
    """
    _draw(path, figure, _draw_points)


def draw_heat_map(path: Path, heat: HeatMap) -> None:
    """A cell per row and column, showing its value if there is room; colours are logarithmic beyond a decade.

    Args:
        path: without a suffix.
        heat: what to draw.

    Raises:
        InputError: matplotlib is not installed, the disk is full or the folder is not writable.
        ValueError: no value, one that is not finite, or not exactly one per row and column.
    """
    if len(heat.values) != len(heat.rows) or any(len(row) != len(heat.columns) for row in heat.values):
        raise ValueError(f"{heat.title}: expected {len(heat.rows)} rows of {len(heat.columns)} values")
    found = [value for row in heat.values for value in row if value is not None]
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{heat.title}: expected finite values")
    canvas, axes = new_canvas(2.2 + 0.3 * max(_FEW // 2, len(heat.rows)), heat.title, heat.x_label, heat.y_label)
    filled = [[math.nan if value is None else value for value in row] for row in heat.values]
    is_log = is_wide(found)
    image = axes.imshow(filled, cmap="cividis", aspect="auto", norm="log" if is_log else "linear")
    name_places(axes, heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows, fontsize=SMALL)
    bar = canvas.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(heat.value_label, fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    if is_log:
        mark_decades(bar.ax.yaxis)
    if len(heat.columns) <= 2 * _FEW:
        ends = min(found), max(found)
        _write_values(axes, heat, math.sqrt(ends[0] * ends[1]) if is_log else sum(ends) / 2)
    fields = [
        (name, column, value)
        for name, row in zip(heat.rows, heat.values, strict=True)
        for column, value in zip(heat.columns, row, strict=True)
    ]
    save(path, canvas, ("row", "column", "value"), fields)


def _draw(path: Path, figure: Figure, draw: Callable[["Axes", Figure], None]) -> None:
    _check(figure)
    names = [*(series.label for series in figure.series), *(level.label for level in figure.levels)]
    columns = min(len(names), max(1, 88 // (max(map(len, names)) + 7)))
    lines = -(-len(names) // columns)
    canvas, axes = new_canvas(5.0 + 0.24 * lines, figure.title, figure.x_label, figure.y_label)
    draw(axes, figure)
    for place, level in enumerate(figure.levels):
        style = DASHES[(place + 1) % len(DASHES)]
        axes.axhline(level.y, color="0.35", linestyle=style, linewidth=1.5, label=legend_name(level.label))
        if level.low is not None and level.high is not None:
            axes.axhspan(level.low, level.high, color="0.35", alpha=0.12, linewidth=0)
    # The ends of an error bar may be below 0 even if no value is.
    if is_wide(row[2] for row in _rows(figure)):
        make_logarithmic(axes.yaxis, axes.set_yscale)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    canvas.legend(loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)
    save(path, canvas, ("label", "x", "y", "low", "high"), _rows(figure))


def _draw_lines(axes: "Axes", figure: Figure) -> None:
    places = places_of(figure)
    numbers = sorted(place for place in places if not isinstance(place, str))
    is_named = len(numbers) < len(places)
    for number, series in enumerate(figure.series):
        x = [places.index(place) if is_named else place for place in series.x]
        # A long curve shows only some of its markers, at different places than the other curves.
        every = max(1, len(x) // _FEW)
        style = _line_style(number) | {"markevery": (number % every, every)}
        axes.errorbar(x, series.y, yerr=_errors(series), label=legend_name(series.label), **style)
    if is_named:
        name_places(axes, [_place_text(place) for place in places])
        return
    if is_wide(numbers) and not figure.is_linear:
        make_logarithmic(axes.xaxis, axes.set_xscale)
    if len(numbers) <= _FEW:
        axes.set_xticks(numbers, [_place_text(number) for number in numbers])
        axes.set_xticks([], minor=True)


def _draw_bars(axes: "Axes", figure: Figure) -> None:
    places = places_of(figure)
    width = 0.84 / len(figure.series)
    for number, series in enumerate(figure.series):
        shift = (number - (len(figure.series) - 1) / 2) * width
        axes.bar(
            [places.index(place) + shift for place in series.x],
            series.y,
            width * 0.92,
            yerr=_errors(series),
            label=legend_name(series.label),
            color=COLOURS[number % len(COLOURS)],
            hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="white",
            linewidth=0,
            error_kw={"elinewidth": 1.2, "capsize": 2.5, "ecolor": "0.15"},
        )
    name_places(axes, [_place_text(place) for place in places])


def _draw_points(axes: "Axes", figure: Figure) -> None:
    places = places_of(figure)
    width = 0.84 / len(figure.series)
    for number, series in enumerate(figure.series):
        style = _line_style(number) | {"linestyle": "none", "elinewidth": 1.0, "capsize": 0, "markersize": 5}
        shift = (number - (len(figure.series) - 1) / 2) * width
        x = _spread_out([places.index(place) + shift for place in series.x], 0.6 * width)
        axes.errorbar(x, series.y, yerr=_errors(series), label=legend_name(series.label), alpha=0.75, **style)
        for place in dict.fromkeys(series.x):
            centre = places.index(place) + shift
            ends = (centre - 0.44 * width, centre + 0.44 * width)
            axes.hlines(_median(series, place), *ends, color=style["color"], linewidth=2.5, zorder=4)
    name_places(axes, [_place_text(place) for place in places])


def _check(figure: Figure) -> None:
    if not any(series.y for series in figure.series):
        raise ValueError(f"{figure.title}: nothing to draw")
    for series in figure.series:
        ends = [each for each in (series.low, series.high) if each is not None]
        if len(ends) == 1 or any(len(each) != len(series.y) for each in (series.x, *ends)):
            raise ValueError(f"{figure.title}: {series.label}: expected as many x, low and high as y")
    numbers = [number for row in _rows(figure) for number in row[2:] if number is not None]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{figure.title}: expected finite numbers")


def _rows(figure: Figure) -> Iterator[tuple[str, Place | None, float, float | None, float | None]]:
    """Everything that is drawn: label, x, y, low, high; a level has no x."""
    for series in figure.series:
        for place, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            if series.low is None or series.high is None:
                yield series.label, x, y, None, None
            else:
                yield series.label, x, y, series.low[place], series.high[place]
    for level in figure.levels:
        yield level.label, None, level.y, level.low, level.high


def _place_text(place: Place) -> str:
    return place if isinstance(place, str) else f"{place:g}"


def places_of(figure: Figure) -> list[Place]:
    """The places that any series has: first those of `figure.places`, in that order."""
    found = dict.fromkeys(place for series in figure.series for place in series.x)
    ordered = [place for place in figure.places if place in found]
    return [*ordered, *(place for place in found if place not in ordered)]


def _errors(series: Series) -> list[list[float]] | None:
    """Lengths of the error bars, below and above; a bootstrap interval need not contain its value."""
    if series.low is None or series.high is None:
        return None
    below = [max(0.0, y - low) for y, low in zip(series.y, series.low, strict=True)]
    return [below, [max(0.0, high - y) for y, high in zip(series.y, series.high, strict=True)]]


def _median(series: Series, place: Place) -> float:
    return statistics.median(y for x, y in zip(series.x, series.y, strict=True) if x == place)


def _spread_out(x: Sequence[float], width: float) -> list[float]:
    """Spreads equal values of x from left to right, in the given order, within `width` around them."""
    counts = {value: x.count(value) for value in x}
    seen = dict.fromkeys(counts, 0)
    moved = []
    for value in x:
        seen[value] += 1
        share = (seen[value] - 0.5) / counts[value] - 0.5
        moved.append(value + width * share)
    return moved


def _line_style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
        "linewidth": 1.8,
        "markersize": 6,
        "elinewidth": 1.2,
        "capsize": 3,
    }


def _write_values(axes: "Axes", heat: HeatMap, middle: float) -> None:
    for row, values in enumerate(heat.values):
        for column, value in enumerate(values):
            if value is not None:
                colour = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=SMALL - 2, color=colour)
