"""The figures of a run's report: curves of training and evaluation, and where the zeros are."""

from collections.abc import Sequence
from typing import Any

from efx_jax.analysis.heat import colour_range, heat_map, scale_legend
from efx_jax.analysis.html import Html, element, fold, join, paragraph, section, table, text
from efx_jax.analysis.record import Row, RunRecord
from efx_jax.analysis.svg import Chart, Line, line_chart

_CURVES = (
    ("loss", "Loss, nats per token"),
    ("entropy", "Entropy of the predictions, nats"),
    ("learning_rate", "Learning rate"),
    ("sparsity", "Sparsity of the pruned matrices"),
)
_JITTERY = ("loss", "entropy")
_SMOOTH_FROM, _TABLE_ROWS = 40, 20


def curves(record: RunRecord) -> Html:
    """Metrics and evaluations by step, with the prune events, and the numbers in a table."""
    rows = record.metrics
    if not rows:
        told = "Nothing was trained: the model was pruned as it is." if not record.summary["steps"] else "No metrics."
        return section("training", "Training", [paragraph(told)])
    events = tuple(event["step"] for event in record.summary["events"])
    figures = [_curve(rows, name, title, events) for name, title in _CURVES]
    told = _events_text(events)
    parts = [paragraph(told), element("div", join(filter(None, figures), "\n"), {"class": "charts"}), _numbers(rows)]
    if record.evaluations:
        names = [name for name in record.evaluations[0] if name != "step"]
        scored = [_evaluation(record.evaluations, name, at, events) for at, name in enumerate(names)]
        parts += [
            element("h3", text("Evaluations during training")),
            element("div", join(filter(None, scored), "\n"), {"class": "charts"}),
        ]
    return section("training", "Training", parts)


def zeros(record: RunRecord) -> Html:
    """The share of zeros by layer and kind of matrix."""
    sparsity: dict[str, list[float]] = record.summary["sparsity"]
    word = "Pruned" if "cut" in record.summary else "Zero"
    names = [name.removesuffix("_proj") for name in sparsity]
    rows = [list(layer) for layer in zip(*sparsity.values(), strict=True)]
    if not any(any(row) for row in rows):
        return section("zeros", "Where the zeros are", [paragraph("No weight is zero: nothing was pruned.")])
    title = f"{word} weights, % by layer and matrix"
    labels = [str(layer) for layer in range(len(rows))]
    ends = colour_range(rows)
    legend = paragraph(f"Colours from {100 * ends[0]:.0f} %, light, to {100 * ends[1]:.0f} %, dark.", "soft")
    means = [
        [text(name), *(text(f"{100 * share:.2f}") for share in (sum(found) / len(found), min(found), max(found)))]
        for name, found in sparsity.items()
    ]
    drawing = [heat_map(title, names, rows, labels, "heat"), scale_legend(ends, "heat-legend")]
    parts = [
        element("figure", join([element("figcaption", text(title)), *drawing, legend], "\n"), {"class": "heat"}),
        table(f"{word} weights of each kind of matrix, %", ["matrix", "all layers", "least", "most"], means),
    ]
    both = element("div", join(parts, "\n"), {"class": "tables"})
    return section("zeros", "Where the zeros are", [both])


def _curve(rows: Sequence[Row], name: str, title: str, events: tuple[int, ...]) -> Html:
    steps = [row["step"] for row in rows]
    values = [row.get(name) for row in rows]
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not points:
        return Html("")
    known = [value for _, value in points]
    lines = [Line(name, steps, values, is_stepped=name == "sparsity")]
    if name in _JITTERY and len(rows) >= _SMOOTH_FROM:
        # An odd number: as many steps before a step as after it, and the step itself.
        width = max(3, len(rows) // 20) | 1
        smooth, meant = _running_mean(values, width), f"mean of {width} logged steps"
        lines = [Line(name, steps, values, is_thin=True), Line(f"{name}, {meant}", steps, smooth)]
        title = f"{title} (thick: {meant})"
    percent = name == "sparsity"
    bounds = (0.0, max(0.1, *known)) if percent else (0.0, max(known)) if name == "learning_rate" else None
    told = _told(title, points)
    return _figure(title, line_chart(Chart(title, told, tuple(lines), events, bounds, percent), f"curve-{name}"))


def _evaluation(rows: Sequence[Row], name: str, at: int, events: tuple[int, ...]) -> Html:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not points:
        return Html("")
    percent = name != "perplexity"
    line = Line(name, [step for step, _ in points], [value for _, value in points])
    told = _told(name, points)
    title = f"{name} %" if percent else name
    return _figure(title, line_chart(Chart(title, told, (line,), events, None, percent), f"evaluation-{at}"))


def _told(title: str, points: Sequence[tuple[int, float]]) -> str:
    """A curve in words: its first and last points."""
    (first, start), (last, end) = points[0], points[-1]
    return f"{title}: {start:.4g} at step {first:,}, {end:.4g} at step {last:,}."


def _figure(title: str, drawing: Html) -> Html:
    return element("figure", join([element("figcaption", text(title)), drawing], "\n"))


def _numbers(rows: Sequence[Row]) -> Html:
    """Evenly spaced lines of metrics.jsonl, for readers who prefer numbers."""
    count = min(_TABLE_ROWS, len(rows))
    places = sorted({round(at * (len(rows) - 1) / max(1, count - 1)) for at in range(count)})
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"]
    cells = [[text(f"{rows[at]['step']:,}"), *(text(_short(rows[at].get(name))) for name in names)] for at in places]
    caption = f"{len(places)} of the {len(rows):,} lines of metrics.jsonl"
    header = ["step", *(name.replace("_", " ") for name in names)]
    return fold(text("The same as numbers"), [table(caption, header, cells)])


def _events_text(events: Sequence[int]) -> str:
    if not events:
        return "There was no prune event."
    shown = ", ".join(f"{event:,}" for event in events[:12]) + (", …" if len(events) > 12 else "")
    times = "once" if len(events) == 1 else f"{len(events)} times"
    return f"Pruned {times}, after step {shown}: the dotted lines below a triangle."


def _running_mean(values: Sequence[Any], width: int) -> list[float | None]:
    """The mean of the `width` values (an odd number) around each value, or of those that exist."""
    means: list[float | None] = []
    for at in range(len(values)):
        around = [v for v in values[max(0, at - width // 2) : at + width // 2 + 1] if v is not None]
        means.append(sum(around) / len(around) if around else None)
    return means


def _short(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
