"""What is drawn stands in the CSV beside the picture, and nothing of the drawing stays in the process."""

import builtins
import csv
import dataclasses
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from efx_jax.analysis.canvas import WIDTH, new_canvas, new_panels
from efx_jax.analysis.plots import (
    Figure,
    HeatMap,
    Level,
    Series,
    draw_bars,
    draw_heat_map,
    draw_lines,
    draw_points,
)
from efx_jax.errors import InputError

pytest.importorskip("matplotlib")

LINES = Figure(
    "perplexity",
    "zeros (%)",
    "perplexity",
    (
        Series("wanda", (30.0, 50.0), (18.5, 29.0), (18.0, 28.0), (19.0, 31.0)),
        Series("efx", (30.0, 50.0, 80.0), (17.0, 21.0, 250.0)),
    ),
    (Level("dense", 15.5, 15.0, 16.0),),
)
POINTS = Figure("seeds", "calibration", "perplexity", (Series("wanda", ("train", "train", "c4"), (24.0, 25.0, 26.5)),))
HEAT = HeatMap("overlap", "layer", "matrix", "%", ("q_proj", "k_proj"), ("0", "1", "2"), ((1, 2, 3), (4, None, 6)))
NUMBERS = [
    ["label", "x", "y", "low", "high"],
    ["wanda", "30.0", "18.5", "18.0", "19.0"],
    ["wanda", "50.0", "29.0", "28.0", "31.0"],
    ["efx", "30.0", "17.0", "", ""],
    ["efx", "50.0", "21.0", "", ""],
    ["efx", "80.0", "250.0", "", ""],
    ["dense", "", "15.5", "15.0", "16.0"],
]


def numbers(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("draw", [draw_lines, draw_bars])
def test_lines_and_bars_leave_their_numbers(draw: Callable[[Path, Figure], None], tmp_path: Path) -> None:
    draw(tmp_path / "new" / "health.50", LINES)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["health.50.csv", "health.50.png"]
    assert numbers(tmp_path / "new" / "health.50.csv") == NUMBERS
    width, height = size(tmp_path / "new" / "health.50.png")
    assert width == WIDTH and WIDTH / 2 < height < WIDTH


def test_places_may_be_given_an_order(tmp_path: Path) -> None:
    """Those that no series has take no room; the picture is that of series that come in this order."""
    series = (Series("a", ("late", "early"), (1, 2)), Series("b", ("early", "late"), (3, 4)))
    draw_bars(tmp_path / "given", Figure("t", "x", "y", series, places=("never", "early", "late")))
    draw_bars(tmp_path / "come", Figure("t", "x", "y", (Series("a", ("early", "late"), (2, 1)), series[1])))
    assert (tmp_path / "given.png").read_bytes() == (tmp_path / "come.png").read_bytes()


def test_points_leave_every_value(tmp_path: Path) -> None:
    draw_points(tmp_path / "seeds", POINTS)
    assert [row[:3] for row in numbers(tmp_path / "seeds.csv")[1:]] == [
        ["wanda", "train", "24.0"],
        ["wanda", "train", "25.0"],
        ["wanda", "c4", "26.5"],
    ]
    assert size(tmp_path / "seeds.png")[0] == WIDTH


def test_a_heat_map_leaves_a_line_per_field(tmp_path: Path) -> None:
    draw_heat_map(tmp_path / "heat", HEAT)
    assert numbers(tmp_path / "heat.csv") == [
        ["row", "column", "value"],
        ["q_proj", "0", "1"],
        ["q_proj", "1", "2"],
        ["q_proj", "2", "3"],
        ["k_proj", "0", "4"],
        ["k_proj", "1", ""],
        ["k_proj", "2", "6"],
    ]
    assert size(tmp_path / "heat.png")[0] == WIDTH


def test_names_that_matplotlib_reads_otherwise_stay_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    seen: list[tuple[str, bool]] = []

    def note(canvas: Canvas, *_: Any, **__: Any) -> None:
        seen.extend((words.get_text().strip(), words.get_parse_math()) for words in canvas.legends[0].get_texts())

    monkeypatch.setattr(Canvas, "savefig", note)
    names = ("_under", "$x_1$ and $y$")
    series = tuple(dataclasses.replace(LINES.series[0], label=name) for name in names)
    draw_lines(tmp_path / "named", dataclasses.replace(LINES, series=series, levels=()))
    assert seen == [(name, False) for name in names]
    assert [row[0] for row in numbers(tmp_path / "named.csv")[1::2]] == list(names)


def test_a_longer_legend_makes_the_picture_higher_not_the_axes_lower(tmp_path: Path) -> None:
    many = Figure("many", "x", "y", tuple(Series(f"a method, its schedule {n}", (1, 2), (1, n)) for n in range(1, 30)))
    draw_lines(tmp_path / "one", LINES)
    draw_lines(tmp_path / "many", many)
    assert size(tmp_path / "many.png")[1] > size(tmp_path / "one.png")[1] + 300


@pytest.mark.parametrize("make", ["canvas", "panels"])
def test_a_long_title_stays_within_the_picture(make: str) -> None:
    title = "a_run_with_a_name_of_forty_letters_or_so: " + "what is drawn of it, " * 6
    if make == "canvas":
        canvas, axes = new_canvas(5.0, title, "x", "y")
        text = axes.title
    else:
        canvas, _ = new_panels(5.0, title, "x", "y", 3, 2)
        (text,) = (each for each in canvas.texts if each.get_text().startswith("a_run"))
    canvas.canvas.draw()
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= WIDTH and box.y1 <= canvas.bbox.height


def test_a_wide_axis_of_x_is_logarithmic_unless_told(tmp_path: Path) -> None:
    steps = Figure("loss", "step", "loss", (Series("a", (1.0, 10.0, 100.0), (3.0, 2.0, 1.0)),))
    draw_lines(tmp_path / "wide", steps)
    draw_lines(tmp_path / "linear", dataclasses.replace(steps, is_linear=True))
    assert (tmp_path / "wide.csv").read_bytes() == (tmp_path / "linear.csv").read_bytes()
    assert (tmp_path / "wide.png").read_bytes() != (tmp_path / "linear.png").read_bytes()


def test_an_end_that_does_not_enclose_its_value_is_drawn_and_told(tmp_path: Path) -> None:
    """A bootstrap interval need not."""
    draw_bars(tmp_path / "odd", Figure("odd", "x", "y", (Series("a", ("b",), (2.0,), (2.5,), (3.0,)),)))
    assert numbers(tmp_path / "odd.csv")[1] == ["a", "b", "2.0", "2.5", "3.0"]


@pytest.mark.parametrize(
    ("series", "said"),
    [
        ((), "nothing to draw"),
        ((Series("a", (), ()),), "nothing to draw"),
        ((Series("a", (1,), (1, 2)),), "a: expected as many x"),
        ((Series("a", (1,), (1,), low=(0,)),), "a: expected as many x"),
        ((Series("a", (1,), (1,), (0,), (1, 2)),), "a: expected as many x"),
        ((Series("a", (1,), (float("inf"),)),), "finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused(series: tuple[Series, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        draw_lines(tmp_path / "figure", Figure("title", "x", "y", series))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [((1,), (2,)), ((1, 2, 3),), ((None,) * 3,) * 2, ((1, 2, float("nan")),) * 2])
def test_a_heat_map_of_other_fields_is_refused(values: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="overlap: expected"):
        draw_heat_map(tmp_path / "heat", HeatMap("overlap", "", "", "", HEAT.rows, HEAT.columns, values))


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"matplotlib.*pip install 'efx_jax\[figures\]'$"):
        draw_lines(tmp_path / "figure", LINES)


def test_drawing_leaves_the_users_own_plots_alone() -> None:
    """Neither pyplot nor a backend is chosen, and importing the module imports no matplotlib."""
    code = """
import sys, tempfile, pathlib
from efx_jax.analysis.plots import Figure, Series, draw_lines
assert "matplotlib" not in sys.modules
import matplotlib
def settings():  # to ask for the backend would choose one
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
draw_lines(pathlib.Path(tempfile.mkdtemp()) / "a", Figure("t", "x", "y", (Series("s", (1, 2), (1, 200)),)))
assert "matplotlib.pyplot" not in sys.modules and settings() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[2])})
