"""Which numbers of a table a figure shows, under which names, and where the dense reference stands."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from efx_jax.analysis.plots import Level, Series
from efx_jax.compare.figures import build_figure, draw_figures
from efx_jax.compare.grid import Cell, list_cells
from efx_jax.compare.records import CellRecord
from efx_jax.compare.settings import Comparison, Drawing, read_comparison
from efx_jax.compare.table import write_tables
from efx_jax.errors import InputError

GRID = """
seeds: [0, 1]
methods: {dense: {prune: {sparsity: 0}}, wanda: {prune: {score: wanda}}, ria: {prune: {score: ria}}}
schedules: {post_hoc: {prune: {schedule: fractions, fractions: [1]}}, during: {prune: {schedule: epochs}}}
axes: {prune.sparsity: [0.5, 0.4]}
evaluate: {texts: {general: wikitext}, tasks: [pubmedqa]}
reference: dense
"""
PERPLEXITY = {"": 15.0, "post_hoc": 30.0, "during": 28.0}
Read = Callable[..., Comparison]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read(more)`: the comparison with YAML lines more, whose keys replace those above."""

    def read_text(more: str = "") -> Comparison:
        own = [line.partition(":")[0] for line in more.splitlines()]
        kept = [line for line in GRID.splitlines() if line.partition(":")[0] not in own]
        (tmp_path / "grid.yaml").write_text("\n".join([*kept, more]))
        return read_comparison(tmp_path / "grid.yaml")

    return read_text


def record(cell: Cell, **metrics: float | None) -> CellRecord:
    """Perplexity 15, 30 or 28 by schedule, 4 more for RIA, 10 less at 40 %, 2 more for each seed."""
    value = PERPLEXITY[cell.schedule] + 4 * (cell.method == "ria") + 2 * cell.seed
    value -= 10 * (cell.config.prune.sparsity == 0.4)
    found = {"perplexity.general": value, "likelihood.pubmedqa.accuracy": 0.5 + cell.seed / 10, **metrics}
    intervals = {"perplexity.general": (value - 1, value + 3), "likelihood.pubmedqa.accuracy": (0.25, 0.75)}
    return CellRecord(cell, found, intervals, True, "")


def records(comparison: Comparison) -> list[CellRecord]:
    return [record(cell) for cell in list_cells(comparison)]


def drawing(x: str, y: str = "perplexity.general", kind: Any = "lines", **only: tuple[Any, ...]) -> Drawing:
    return Drawing(x, y, kind, {key.replace("__", "."): value for key, value in only.items()})


def near(values: Sequence[float]) -> Any:
    return pytest.approx(tuple(values))


def test_an_axis_has_a_line_per_method_and_schedule_and_the_dense_level(read: Read) -> None:
    comparison = read()
    figure = build_figure(comparison, drawing("prune.sparsity"), records(comparison))
    assert [series.label for series in figure.series] == [
        "wanda, post_hoc",
        "wanda, during",
        "ria, post_hoc",
        "ria, during",
    ]
    assert [series.x for series in figure.series] == [(40.0, 50.0)] * 4
    assert figure.series[0].y == (21.0, 31.0)
    # Two seeds, 2 apart: the deviation is the root of 2.
    assert figure.series[0].low == near((21 - 2**0.5, 31 - 2**0.5))
    assert figure.series[0].high == near((21 + 2**0.5, 31 + 2**0.5))
    assert figure.levels == (Level("dense", 16.0, pytest.approx(16 - 2**0.5), pytest.approx(16 + 2**0.5)),)
    assert (figure.x_label, figure.y_label) == ("prune.sparsity (%)", "general perplexity")
    assert figure.title == "grid: general perplexity\nmean ± standard deviation over up to 2 seeds"


def test_by_schedule_at_one_sparsity_there_is_a_series_per_method(read: Read) -> None:
    comparison = read()
    asked = drawing("schedule", kind="bars", prune__sparsity=(0.5,))
    figure = build_figure(comparison, asked, records(comparison))
    assert [(series.label, series.x, series.y) for series in figure.series] == [
        ("wanda", ("post_hoc", "during"), (31.0, 29.0)),
        ("ria", ("post_hoc", "during"), (35.0, 33.0)),
    ]
    assert [level.label for level in figure.levels] == ["dense"]
    assert figure.title.startswith("grid: general perplexity, prune.sparsity 0.5\n")


def test_by_method_all_that_varies_is_in_the_label(read: Read) -> None:
    comparison = read("axes: {prune.sparsity: [0.4, 0.5], lora.rank: [8, 16]}")
    figure = build_figure(comparison, drawing("method", kind="bars", schedule=("during",)), records(comparison))
    assert [series.label for series in figure.series] == [
        "sparsity 0.4, rank 8",
        "sparsity 0.4, rank 16",
        "sparsity 0.5, rank 8",
        "sparsity 0.5, rank 16",
    ]
    assert {series.x for series in figure.series} == {("wanda", "ria")}
    assert [level.label for level in figure.levels] == ["dense, rank 8", "dense, rank 16"]


def test_the_dense_method_has_a_line_where_the_axis_is_its_own_too(read: Read) -> None:
    comparison = read("axes: {lora.rank: [8, 16]}\nruns: {dense: , wanda: during}")
    figure = build_figure(comparison, drawing("lora.rank"), records(comparison))
    assert [(series.label, series.x, series.y) for series in figure.series] == [
        ("dense", (8, 16), (16.0, 16.0)),
        ("wanda", (8, 16), (29.0, 29.0)),
    ]
    assert figure.levels == ()


def test_places_stand_in_the_order_of_the_file_whatever_is_there(read: Read) -> None:
    comparison = read("runs: {ria: during, wanda: [during, post_hoc]}\nreference:")
    figure = build_figure(comparison, drawing("schedule", kind="bars", prune__sparsity=(0.5,)), records(comparison))
    assert [series.label for series in figure.series] == ["wanda", "ria"]
    assert figure.places == ("post_hoc", "during")


def test_points_are_all_seeds(read: Read) -> None:
    comparison = read("axes: {prune.calibration: [train, c4]}\nruns: {wanda: during}\nreference:")
    figure = build_figure(comparison, drawing("prune.calibration", kind="points"), records(comparison))
    assert figure.series == (Series("wanda", ("train", "train", "c4", "c4"), (28.0, 30.0, 28.0, 30.0)),)
    assert figure.title == "grid: general perplexity\nall seeds, up to 2 of each, and their median"


def test_one_seed_has_the_interval_of_its_evaluation_in_percent(read: Read) -> None:
    comparison = read("seeds: 1\naxes: {prune.ema: [0.5]}\nruns: {wanda: during}\nreference:")
    asked = drawing("prune.ema", "likelihood.pubmedqa.accuracy")
    (series,) = build_figure(comparison, asked, records(comparison)).series
    assert (series.y, series.low, series.high) == (near([60]), near([25]), near([75]))


def test_an_interval_stands_nowhere_beside_deviations(read: Read) -> None:
    """RIA has one seed of two: what its bar would show is another thing than what the title says."""
    comparison = read()
    found = [each for each in records(comparison) if each.cell.method != "ria" or each.cell.seed == 0]
    figure = build_figure(comparison, drawing("schedule", kind="bars", prune__sparsity=(0.5,)), found)
    wanda, ria = figure.series
    assert wanda.low == near((31 - 2**0.5, 29 - 2**0.5))
    assert ria.y == (34.0, 32.0) and not ria.low and not ria.high
    assert figure.title.endswith("\nmean ± standard deviation over up to 2 seeds")
    # Neither do they beside the deviations of a level.
    dense = [each for each in records(comparison) if each.cell.method == "dense" or each.cell.seed == 0]
    figure = build_figure(comparison, drawing("schedule", kind="bars", prune__sparsity=(0.5,)), dense)
    assert not any(series.low for series in figure.series)
    assert figure.levels[0].low == pytest.approx(16 - 2**0.5)
    assert figure.title.endswith("\nmean ± standard deviation over up to 2 seeds")


def test_what_no_teacher_teaches_is_a_level_with_its_schedule_where_that_varies(read: Read) -> None:
    comparison = read(
        "methods: {dense: {prune: {sparsity: 0}}, wanda: {}, taught: {distill: {teacher: base}}}\n"
        "runs: {dense: , wanda: [post_hoc, during], taught: during}\naxes: {distill.share: [0.25, 0.5]}"
    )
    figure = build_figure(comparison, drawing("distill.share"), records(comparison))
    assert [(series.label, series.x) for series in figure.series] == [("taught, during", (0.25, 0.5))]
    assert [level.label for level in figure.levels] == ["dense", "wanda, post_hoc", "wanda, during"]


def test_what_is_not_there_or_not_finite_is_left_out(read: Read) -> None:
    comparison = read()
    found = records(comparison)
    wanda = [each.cell.method == "wanda" and each.cell.axes == (0.5,) for each in found]
    gone = [CellRecord(each.cell, {}, {}, False, "") if skip else each for each, skip in zip(found, wanda, strict=True)]
    infinite = [
        record(each.cell, **{"perplexity.general": None}) if skip else each
        for each, skip in zip(found, wanda, strict=True)
    ]
    for some in (gone, infinite):
        figure = build_figure(comparison, drawing("prune.sparsity"), some)
        assert [series.x for series in figure.series] == [(40.0,), (40.0,), (40.0, 50.0), (40.0, 50.0)]


@pytest.mark.parametrize(
    ("y", "change", "said"),
    [
        ("perplexity.general", {"metrics": {}, "is_whole": False}, "none of its runs is there yet"),
        ("likelihood.hqs.rouge1", {}, "no run has likelihood.hqs.rouge1; they have perplexity.general, likelihood.pub"),
        ("perplexity.general", {"metrics": {"perplexity.general": None}}, "no run has a finite perplexity.general"),
    ],
)
def test_why_there_is_nothing_to_draw(y: str, change: dict[str, Any], said: str, read: Read) -> None:
    comparison = read()
    some = [CellRecord(**(vars(each) | change)) for each in records(comparison)]
    with pytest.raises(InputError, match=said):
        build_figure(comparison, drawing("schedule", y), some)


def test_figures_stand_beside_the_table_and_in_it(read: Read, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison = read(
        "figures: {ppl: {x: schedule, y: perplexity.general, kind: bars, only: {prune.sparsity: 0.5}},"
        " rouge: {x: prune.sparsity, y: likelihood.hqs.rouge1, kind: lines}}"
    )
    found = records(comparison)
    drawn = draw_figures(comparison, found, tmp_path / "out" / "figures")
    assert drawn["ppl"] == "" and drawn["rouge"].startswith("no run has likelihood.hqs.rouge1")
    assert sorted(path.name for path in (tmp_path / "out" / "figures").iterdir()) == ["ppl.csv", "ppl.png"]
    with (tmp_path / "out" / "figures" / "ppl.csv").open() as stream:
        lines = [(line["label"], line["x"], float(line["y"])) for line in csv.DictReader(stream)]
    assert lines == [
        ("wanda", "post_hoc", 31.0),
        ("wanda", "during", 29.0),
        ("ria", "post_hoc", 35.0),
        ("ria", "during", 33.0),
        ("dense", "", 16.0),
    ]
    text = write_tables(comparison, found, {}, drawn, tmp_path / "out")
    assert "## Figures\n\n![ppl](figures/ppl.png)\n\nIts numbers: [ppl.csv](figures/ppl.csv)\n" in text
    assert "- no figure rouge: no run has likelihood.hqs.rouge1; they have" in text
    assert "![rouge]" not in text


def test_a_heat_map_has_a_row_per_series_and_nothing_where_no_run_is(read: Read, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison = read(
        "runs: {dense: , wanda: [post_hoc, during], ria: during}\naxes: {prune.sparsity: [0.5]}\n"
        "figures: {all: {x: schedule, y: perplexity.general, kind: heat_map}}"
    )
    assert draw_figures(comparison, records(comparison), tmp_path) == {"all": ""}
    assert (tmp_path / "all.png").stat().st_size > 10_000
    assert (tmp_path / "all.csv").read_text().splitlines() == [
        "row,column,value",
        "wanda,post_hoc,31.0",
        "wanda,during,29.0",
        "ria,post_hoc,",
        "ria,during,33.0",
    ]


def test_a_heat_map_has_a_column_for_a_value_that_only_a_method_names(read: Read, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison = read(
        "methods: {dense: {prune: {sparsity: 0}}, wanda: {prune: {score: wanda}}, "
        "half: {prune: {score: wanda, sparsity: 0.5}}}\n"
        "runs: {dense: , wanda: [post_hoc], half: [post_hoc]}\naxes: {prune.sparsity: [0.4]}\n"
        "figures: {all: {x: prune.sparsity, y: perplexity.general, kind: heat_map}}"
    )
    found = records(comparison)
    only = [record for record in found if record.cell.method == "half"]
    for part in (only, found):
        assert draw_figures(comparison, part, tmp_path) == {"all": ""}
        assert "half,50,31.0" in (tmp_path / "all.csv").read_text().splitlines()


def test_without_figures_no_folder_and_no_section_is_made(read: Read, tmp_path: Path) -> None:
    comparison = read()
    drawn = draw_figures(comparison, records(comparison), tmp_path / "out" / "figures")
    assert "Figures" not in write_tables(comparison, records(comparison), {}, drawn, tmp_path / "out")
    assert not (tmp_path / "out" / "figures").exists()
