"""Where figures are drawn: a canvas without global state, its axes, and the files that it is saved as."""

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efx_jax.errors import InputError
from efx_jax.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

WIDTH = 1800
"""Pixels; text and lines are sized to be read at half of it."""

TEXT = 11
SMALL = 10
_DPI = 200
_DECADE = 10.0
_LINE = 84  # maximum characters per line of a title


def require_matplotlib() -> None:
    """Refuses if figures cannot be drawn; long measurements check this before they begin.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(f"figures need matplotlib ({error}); pip install 'efx_jax[figures]'") from error


def new_canvas(height: float, title: str, x_label: str, y_label: str) -> tuple["Canvas", "Axes"]:
    """A canvas of WIDTH pixels and a height in inches, independent of any window system and of other figures.

    Raises:
        InputError: matplotlib is not installed.
    """
    canvas = _blank(height)
    axes = canvas.add_subplot()
    axes.set_title(_wrapped(title), fontsize=TEXT + 1)
    axes.set_xlabel(x_label, fontsize=TEXT)
    axes.set_ylabel(y_label, fontsize=TEXT)
    _plain(axes)
    return canvas, axes


def new_panels(
    height: float, title: str, x_label: str, y_label: str, count: int, columns: int
) -> tuple["Canvas", list["Axes"]]:
    """A canvas as in `new_canvas`, with `count` axes in rows of `columns`, which share their labels and scales.

    Raises:
        InputError: matplotlib is not installed.
    """
    canvas = _blank(height)
    rows = -(-count // columns)
    first: Axes | None = None
    panels: list[Axes] = []
    for number in range(count):
        axes = canvas.add_subplot(rows, columns, number + 1, sharex=first, sharey=first)
        first = first or axes
        _plain(axes)
        # Only the lowest of a column and the first of a row label the ticks.
        is_lowest = number + columns >= count
        axes.tick_params(labelbottom=is_lowest, labelleft=number % columns == 0)
        # A label for the whole canvas would be below the axes' area, where the legend is.
        axes.set_xlabel(x_label if is_lowest else "", fontsize=TEXT)
        panels.append(axes)
    canvas.suptitle(_wrapped(title), fontsize=TEXT + 1)
    canvas.supylabel(y_label, fontsize=TEXT)
    return canvas, panels


def _wrapped(title: str) -> str:
    """A title wrapped to the width of the canvas, since users choose the names of runs."""
    return "\n".join(textwrap.fill(line, _LINE) for line in title.splitlines())


def _blank(height: float) -> "Canvas":
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH / _DPI, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def legend_name(label: str) -> str:
    """A name that a legend shows: matplotlib hides names that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def save(path: Path, canvas: "Canvas", header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes PATH.png and, with the numbers, PATH.csv.

    Raises:
        InputError: the disk is full or the folder is not writable.
    """
    from matplotlib.text import Text

    for artist in canvas.findobj():
        if isinstance(artist, Text):
            artist.set_parse_math(False)  # a run's name may contain dollar signs
    image, numbers = io.BytesIO(), io.StringIO()
    canvas.savefig(image, format="png")
    writer = csv.writer(numbers, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # A name may contain dots.
    atomic_write(path.with_name(f"{path.name}.png"), image.getvalue())
    atomic_write(path.with_name(f"{path.name}.csv"), numbers.getvalue())


def is_wide(numbers: Iterable[float]) -> bool:
    """Whether the numbers are above 0 and span more than a decade."""
    found = list(numbers)
    return min(found) > 0 and max(found) > _DECADE * min(found)


def make_logarithmic(axis: "Axis", set_scale: Callable[[str], None]) -> None:
    """Makes an axis logarithmic, with plain numbers as tick labels."""
    set_scale("log")
    mark_decades(axis)


def mark_decades(axis: "Axis") -> None:
    """Puts ticks at 1, 2, 5, 10, ..., labelled as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def name_places(axes: "Axes", names: Sequence[str]) -> None:
    """Writes names below x = 0, 1, ..., slanted if they would touch."""
    # 96 characters fit side by side if every name gets as much room as the longest.
    is_tight = len(names) * (max(map(len, names)) + 1) > 96
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
    axes.set_xticks(range(len(names)), names, fontsize=SMALL, **slanted)
