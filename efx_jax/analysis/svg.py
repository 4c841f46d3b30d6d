"""Line charts over training steps as inline SVG: pure functions, no library.

A chart is 360 units wide, about a phone's width, so that its text is never scaled down much.
Colours come from the page's style sheet; lines also differ in their dashes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from efx_jax.analysis.html import Html, element, join, text

WIDTH = 360
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 200, 48, 12, 22, 34
_MOST_POINTS = 400
_MARKED_POINTS = 60
_MOST_DIGITS = 4

_Axis = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class Line:
    """Values by step; None is a gap.

    `is_thin` is for noisy values behind a smoother line. `is_stepped`: a value applies from the step before to its own.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float | None]
    is_thin: bool = False
    is_stepped: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over training steps, with the steps of events. `bounds`: values that the y axis must include."""

    title: str
    description: str
    lines: tuple[Line, ...]
    events: tuple[int, ...] = ()
    bounds: tuple[float, float] | None = None
    percent: bool = False


def line_chart(chart: Chart, name: str) -> Html:
    """A chart; `name` is unique on the page. Lines of more than 400 points are drawn as means of neighbours."""
    lines = [thinned(line) for line in chart.lines]
    steps = [step for line in lines for step in line.steps]
    values = [value for line in lines for value in line.values if value is not None]
    if not values:
        return Html("")
    ticks = nice_ticks(*_reach(values, chart.bounds))
    last = max(*steps, *chart.events, 1)
    first = min(*steps, *chart.events, last - 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (ticks[-1] - value) / (ticks[-1] - ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    digits = _digits(ticks, chart.percent)
    for tick in ticks:
        parts.append(stroke("grid", _LEFT, y(tick), WIDTH - _RIGHT, y(tick)))
        parts.append(label(number(tick, digits, chart.percent), _LEFT - 6, y(tick) + 4, "end"))
    parts += [
        label(f"{step:,.0f}", x(step), _HEIGHT - 18, _side(step, first, last)) for step in _step_ticks(first, last)
    ]
    parts.append(label("step", (_LEFT + WIDTH - _RIGHT) / 2, _HEIGHT - 3, "middle"))
    for event in chart.events:
        parts.append(stroke("event", x(event), _TOP, x(event), _HEIGHT - _BOTTOM, f"prune event after step {event:,}"))
        # A small triangle, so that events can be recognised by more than their dashes.
        parts.append(element("path", attributes={"class": "flag", "d": f"M{x(event) - 4:.1f} {_TOP - 7}h8l-4 7z"}))
    for index, line in enumerate(sorted(lines, key=lambda line: not line.is_thin)):
        parts += _drawn(line, index - sum(line.is_thin for line in lines), x, y, digits, chart.percent)
    return figure(_HEIGHT, name, chart.title, chart.description, parts)


def bar(share: float) -> Html:
    """A bar for a table cell, shown next to its number."""
    filled = element("rect", attributes={"class": "bar", "width": 100 * share, "height": 8})
    box: dict[str, str | float] = {"class": "track", "width": 100, "height": 8}
    shape = {"class": "bars", "viewBox": "0 0 100 8", "preserveAspectRatio": "none", "aria-hidden": "true"}
    return element("svg", join([element("rect", attributes=box), filled]), shape)


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers, of which the first is at most `low` and the last at least `high`."""
    if high <= low:
        spread = abs(low) / 10 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [tick * step for tick in range(first, last + 1)]


def number(value: float, digits: int, percent: bool = False) -> str:
    """A number for a label: in percent, with `digits` decimals, or with three significant digits if that is above 4."""
    if percent:
        return f"{100 * value:.{digits}f} %"
    return f"{value:,.{digits}f}" if digits <= _MOST_DIGITS else f"{value:.3g}".replace("e-0", "e-")


def label(words: str, x: float, y: float, anchor: str) -> Html:
    """Words whose `anchor` ("start", "middle" or "end") is at x, on the baseline y."""
    return element("text", text(words), {"x": _place(x), "y": _place(y), "text-anchor": anchor})


def stroke(look: str, x1: float, y1: float, x2: float, y2: float, told: str = "") -> Html:
    """A straight line with a class, which shows `told` as a tooltip."""
    ends: dict[str, str | float] = {"x1": _place(x1), "y1": _place(y1), "x2": _place(x2), "y2": _place(y2)}
    return element("line", element("title", text(told)) if told else "", {"class": look} | ends)


def figure(height: float, name: str, title: str, description: str, parts: Sequence[Html]) -> Html:
    """An image with a name and a description for those who cannot see it; `name` is unique on the page."""
    head = [
        element("title", text(title), {"id": f"{name}-title"}),
        element("desc", text(description), {"id": f"{name}-desc"}),
    ]
    shape: dict[str, str | float] = {
        "viewBox": f"0 0 {WIDTH} {_place(height)}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    return element("svg", join([*head, *parts], "\n"), shape)


def thinned(line: Line) -> Line:
    """The line itself, or if it has more than 400 points, means of groups of neighbours of equal size."""
    count = len(line.steps)
    if count <= _MOST_POINTS:
        return line
    width = math.ceil(count / _MOST_POINTS)
    bins = [slice(start, start + width) for start in range(0, count, width)]
    values = [[value for value in line.values[part] if value is not None] for part in bins]
    return dataclasses.replace(
        line,
        steps=[sum(line.steps[part]) / len(line.steps[part]) for part in bins],
        values=[sum(found) / len(found) if found else None for found in values],
    )


def _drawn(line: Line, index: int, x: _Axis, y: _Axis, digits: int, percent: bool) -> list[Html]:
    """The line, in pieces where values are missing, and a marker on each point if there are few."""
    look = "thin" if line.is_thin else f"line line{index % 4}"
    pieces: list[list[str]] = [[]]
    marks = []
    for step, value in zip(line.steps, line.values, strict=True):
        if value is None:
            pieces.append([])
            continue
        if line.is_stepped and pieces[-1]:
            pieces[-1].append(f"{pieces[-1][-1].partition(',')[0]},{_place(y(value))}")
        pieces[-1].append(f"{_place(x(step))},{_place(y(value))}")
        if len(line.steps) <= _MARKED_POINTS and not line.is_thin:
            told = element("title", text(f"{line.name}, step {step:,.0f}: {number(value, digits + 1, percent)}"))
            at: dict[str, str | float] = {"cx": _place(x(step)), "cy": _place(y(value)), "r": 2.5}
            marks.append(element("circle", told, {"class": f"mark mark{index % 4}"} | at))
    drawn = [
        element("polyline", attributes={"class": look, "points": " ".join(piece)}) for piece in pieces if len(piece) > 1
    ]
    return drawn + marks


def _reach(values: Sequence[float], bounds: tuple[float, float] | None) -> tuple[float, float]:
    ends = [*values, *(bounds or ())]
    return min(ends), max(ends)


def _digits(ticks: Sequence[float], percent: bool) -> int:
    """The number of decimals that shows the ticks exactly, so that neighbouring ones differ."""
    step = (ticks[1] - ticks[0]) * (100 if percent else 1)
    shown = (digits for digits in range(_MOST_DIGITS + 1) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6)
    return next(shown, _MOST_DIGITS + 1)


def _step_ticks(first: float, last: float) -> list[float]:
    return [tick for tick in nice_ticks(first, last) if first <= tick <= last and tick == round(tick)]


def _side(step: float, first: float, last: float) -> str:
    """The anchor of a step's label: near the right edge it ends at the step, or half of it would be cut off."""
    return "end" if step > last - 0.08 * (last - first) else "middle"


def _place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
