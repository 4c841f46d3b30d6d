"""Charts put every value where its axis says, and the heat map's colours are even steps of one hue, easy to read."""

import itertools
import math
import re

import pytest

from efx_jax.analysis.heat import colour_range, heat_map, shade
from efx_jax.analysis.svg import WIDTH, Chart, Line, line_chart, nice_ticks, thinned


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def lightness(colour: str) -> float:
    """CIE 1976 L*: what OKLCH's own lightness is checked against."""
    light = luminance(colour)
    return 116 * light ** (1 / 3) - 16 if light > 0.008856 else 903.3 * light


@pytest.mark.parametrize("ends", [(0, 1), (0.3, 0.35), (-5, 17), (1e-5, 1e-3), (2, 2), (0, 0), (9.99, 1234.5)])
def test_ticks_are_round_even_and_reach_both_ends(ends: tuple[float, float]) -> None:
    ticks = nice_ticks(*ends)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] <= ends[0] and ticks[-1] >= ends[1]
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))
    leading = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert any(leading == pytest.approx(round_step) for round_step in (1, 2, 2.5, 5))


def test_points_stand_where_the_axes_say() -> None:
    chart = Chart("t", "d", (Line("loss", [0, 5, 10], [4.0, 2.0, 0.0]),), events=(5,))
    drawn = line_chart(chart, "c")
    (points,) = re.findall(r'<polyline class="line line0" points="([^"]+)"', drawn)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert places[1] == tuple((a + b) / 2 for a, b in zip(places[0], places[2], strict=True))
    labels = {
        words: float(y)
        for y, words in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', drawn)
    }
    assert labels["4"] - labels["0"] == pytest.approx(places[0][1] - places[2][1])
    (event,) = re.findall(r'<line class="event" x1="([\d.]+)"', drawn)
    assert float(event) == places[1][0]
    assert all(0 <= x <= WIDTH for x, _ in places)


def test_a_missing_value_is_a_gap_and_no_values_no_chart() -> None:
    drawn = line_chart(Chart("t", "d", (Line("loss", [1, 2, 3, 4, 5], [1.0, 2.0, None, 2.0, 1.0]),)), "c")
    assert drawn.count("<polyline") == 2 and drawn.count("<circle") == 4
    assert line_chart(Chart("t", "d", (Line("loss", [1], [None]),)), "c") == ""


def test_an_event_before_the_first_value_is_within_the_chart() -> None:
    drawn = line_chart(Chart("t", "d", (Line("accuracy", [30, 60], [0.1, 0.2]),), events=(2, 70)), "c")
    assert all(0 <= float(x) <= WIDTH for x in re.findall(r'x1="(-?[\d.]+)"', drawn))


def test_a_step_holds_since_the_step_before() -> None:
    drawn = line_chart(Chart("t", "d", (Line("sparsity", [0, 1, 2], [0.0, 0.5, 0.5], is_stepped=True),)), "c")
    (points,) = re.findall(r'<polyline class="line line0" points="([^"]+)"', drawn)
    (x0, y0), (x1, y1), (x2, y2), *_ = [tuple(map(float, point.split(","))) for point in points.split()]
    assert x0 == x1 < x2 and y0 > y1 == y2


def test_a_long_line_becomes_means_of_neighbours() -> None:
    line = Line("loss", list(range(1000)), [float(step) for step in range(999)] + [None])
    found = thinned(line)
    assert len(found.steps) == 334 and found.values[:2] == [1.0, 4.0] == list(found.steps[:2])
    assert found.values[-1] is None
    assert thinned(Line("loss", [1, 2], [1.0, 2.0])).steps == [1, 2]


def test_colours_darken_evenly_in_one_hue_and_their_numbers_can_be_read() -> None:
    colours = [shade(share / 20) for share in range(21)]
    falls = [lightness(before) - lightness(after) for (before, _), (after, _) in itertools.pairwise(colours)]
    assert min(falls) > 0 and max(falls) < 2 * min(falls)
    for colour, ink in colours:
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        assert red <= green <= blue  # never red against green
        lighter, darker = sorted((luminance(colour), luminance(ink)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_colours_span_what_differs_and_all_of_it_where_nothing_does() -> None:
    assert colour_range([[0.5, 0.501], [0.4999, 0.5]]) == (0.0, 1.0)
    assert colour_range([[0.31, 0.5], [0.42, 0.58]]) == pytest.approx((0.3, 0.6))


def test_every_cell_carries_its_number_and_says_it_whole() -> None:
    drawn = heat_map("zeros", ["q", "up"], [[0.25, 0.5], [0.75, 1.0]], ["0", "1"], "h")
    assert re.findall(r'class="cell"[^>]*>([\d.]+)<', drawn) == ["25.0", "50.0", "75.0", "100.0"]
    assert "<title>layer 1, q: 75.00 %</title>" in drawn
