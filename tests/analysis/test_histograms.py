"""What a histogram draws stands in the CSV beside it."""

import csv

import pytest

from efx_jax.analysis.histograms import Histogram, Mark, Panel, Shares, draw_histograms

pytest.importorskip("matplotlib")

PANELS = tuple(
    Panel(name, (Shares("kept", (1.0, 2.0)), Shares("pruned", (3.0, 0.0))), (Mark("threshold", 0.0),))
    for name in ("q_proj", "k_proj", "v_proj")
)


def test_panels_leave_their_numbers(tmp_path) -> None:
    draw_histograms(tmp_path / "scores", Histogram("t", "x", "y", (-1.0, 0.0, 1.0), PANELS))
    with (tmp_path / "scores.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[:5] == [
        ["panel", "label", "low", "high", "value"],
        ["q_proj", "kept", "-1.0", "0.0", "1.0"],
        ["q_proj", "kept", "0.0", "1.0", "2.0"],
        ["q_proj", "pruned", "-1.0", "0.0", "3.0"],
        ["q_proj", "pruned", "0.0", "1.0", "0.0"],
    ]
    assert rows[-1] == ["v_proj", "threshold", "0.0", "0.0", ""]
    assert len(rows) == 1 + 3 * 5
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("panels", "said"),
    [
        ((), "nothing to draw"),
        ((Panel("q", ()),), "nothing to draw"),
        ((Panel("q", (Shares("kept", (1.0,)),)),), "kept: expected 2 values"),
        ((Panel("q", (Shares("kept", (1.0, float("nan"))),)),), "finite"),
    ],
)
def test_a_histogram_of_other_numbers_is_refused(panels, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        draw_histograms(tmp_path / "h", Histogram("t", "x", "y", (-1.0, 0.0, 1.0), panels))
    assert not list(tmp_path.iterdir())
