"""Distributions, several per panel and several panels per figure, as PATH.png and PATH.csv."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_jax.analysis.canvas import SMALL, TEXT, legend_name, new_panels, save
from efx_jax.analysis.plots import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2
_ROW = 1.75  # inches


@dataclasses.dataclass(frozen=True)
class Shares:
    """How much of `label` falls between each pair of neighbouring edges, in the unit of `Histogram.y_label`."""

    label: str
    y: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Mark:
    """A reference value of x for the distributions: a vertical line."""

    label: str
    x: float


@dataclasses.dataclass(frozen=True)
class Panel:
    """Distributions over one pair of axes."""

    title: str
    series: tuple[Shares, ...]
    marks: tuple[Mark, ...] = ()


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Panels over the same `edges`, ascending; a label has the same style in all panels."""

    title: str
    x_label: str
    y_label: str
    edges: tuple[float, ...]
    panels: tuple[Panel, ...]


def draw_histograms(path: Path, figure: Histogram) -> None:
    """Outlines of the distributions, the first of a panel filled, a dashed line at each mark.

    Args:
        path: without a suffix.
        figure: what to draw.

    Raises:
        InputError: matplotlib is not installed, the disk is full or the folder is not writable.
        ValueError: nothing to draw, a number that is not finite, or not exactly one number per pair of edges.
    """
    _check(figure)
    names = list(dict.fromkeys(shares.label for panel in figure.panels for shares in panel.series))
    marks = list(dict.fromkeys(mark.label for panel in figure.panels for mark in panel.marks))
    columns = min(_COLUMNS, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    legend_columns = max(1, 88 // (max(map(len, (*names, *marks))) + 7))
    lines = -(-(len(names) + len(marks)) // legend_columns)
    height = 1.7 + 0.24 * lines + (_ROW * rows if rows > 1 else 2.6)
    canvas, panels = new_panels(height, figure.title, figure.x_label, figure.y_label, len(figure.panels), columns)
    for axes, panel in zip(panels, figure.panels, strict=True):
        _draw_panel(axes, panel, figure.edges, names, marks)
    highest = max(y for panel in figure.panels for shares in panel.series for y in shares.y)
    panels[0].set_ylim(0, 1.06 * highest or 1)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    canvas.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), legend_columns),
        fontsize=SMALL,
        frameon=False,
    )
    fields: list[tuple[Any, ...]] = [
        (panel.title, shares.label, low, high, y)
        for panel in figure.panels
        for shares in panel.series
        for low, high, y in zip(figure.edges, figure.edges[1:], shares.y, strict=False)
    ]
    fields += [(panel.title, mark.label, mark.x, mark.x, "") for panel in figure.panels for mark in panel.marks]
    save(path, canvas, ("panel", "label", "low", "high", "value"), fields)


def _draw_panel(axes: "Axes", panel: Panel, edges: tuple[float, ...], names: list[str], marks: list[str]) -> None:
    for place, shares in enumerate(panel.series):
        number = names.index(shares.label)
        axes.stairs(
            shares.y,
            edges,
            label=legend_name(shares.label),
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number % len(DASHES)],
            linewidth=1.8,
        )
        if place == 0:
            axes.stairs(shares.y, edges, fill=True, alpha=0.15, color=COLOURS[number % len(COLOURS)])
    for mark in panel.marks:
        style = DASHES[(marks.index(mark.label) + 1) % len(DASHES)]
        axes.axvline(mark.x, color="0.25", linestyle=style, linewidth=1.5, label=legend_name(mark.label))
    axes.set_title(panel.title, fontsize=TEXT, loc="left")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _check(figure: Histogram) -> None:
    if not any(panel.series for panel in figure.panels):
        raise ValueError(f"{figure.title}: nothing to draw")
    for panel in figure.panels:
        for shares in panel.series:
            if len(shares.y) != len(figure.edges) - 1:
                raise ValueError(f"{figure.title}: {shares.label}: expected {len(figure.edges) - 1} values")
    numbers = [y for panel in figure.panels for shares in panel.series for y in shares.y]
    numbers += [mark.x for panel in figure.panels for mark in panel.marks]
    if not all(map(math.isfinite, (*numbers, *figure.edges))):
        raise ValueError(f"{figure.title}: expected finite numbers")
