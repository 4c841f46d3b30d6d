"""Heat maps of shares as inline SVG: one hue, darker for more, with the number in every cell."""

import math
from collections.abc import Sequence

from efx_jax.analysis.html import Html, element, text
from efx_jax.analysis.svg import WIDTH, figure, label

_HUE = math.radians(250)
_LEFT, _TOP, _ROW = 30, 22, 18


def heat_map(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[float]], labels: Sequence[str], name: str
) -> Html:
    """Shares in [0, 1] as coloured cells with their percentages.

    Args:
        title: what it shows.
        columns: their names, C.
        rows: R rows of C shares.
        labels: names of the rows, R.
        name: unique on the page.
    """
    ends = colour_range(rows)
    width = (WIDTH - _LEFT) / len(columns)
    parts = [label(column, _LEFT + (at + 0.5) * width, _TOP - 8, "middle") for at, column in enumerate(columns)]
    for line, (row, layer) in enumerate(zip(rows, labels, strict=True)):
        y = _TOP + line * _ROW
        parts.append(label(layer, _LEFT - 6, y + 13, "end"))
        for at, share in enumerate(row):
            told = f"layer {layer}, {columns[at]}: {100 * share:.2f} %"
            parts += _cell(share, ends, _LEFT + at * width, y, width, told)
    description = f"Percentages by layer (rows) and matrix (columns), {_range_text(ends)}."
    return figure(_TOP + _ROW * len(rows) + 2, name, title, description, parts)


def scale_legend(ends: tuple[float, float], name: str) -> Html:
    """The colours of a heat map from the lowest to the highest share, as a strip with numbers."""
    steps = 9
    width = WIDTH / steps
    parts = []
    for at in range(steps):
        share = ends[0] + (ends[1] - ends[0]) * at / (steps - 1)
        parts += _cell(share, ends, at * width, 0, width, f"{100 * share:.1f} %")
    return figure(_ROW, name, "Colours of the heat map", _range_text(ends), parts)


def colour_range(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What the lightest and darkest colours stand for: 0 and 1 if all shares are equal, else multiples of 1/20."""
    shares = [share for row in rows for share in row]
    low, high = min(shares), max(shares)
    if high - low < 0.005:
        return 0.0, 1.0
    return math.floor(20 * low + 1e-9) / 20, math.ceil(20 * high - 1e-9) / 20


def shade(share: float) -> tuple[str, str]:
    """The colour of a share in [0, 1] and that of the number on it, black or white, whichever is easier to read.

    Equal steps of the share are equal steps in lightness of one hue, in OKLCH (Björn Ottosson, "A perceptual color
    space", 2020).
    """
    lightness = 0.97 - 0.62 * min(1.0, max(0.0, share))
    chroma = 0.02 + 0.11 * math.sin(math.pi * min(1.0, max(0.0, share)) * 0.75)
    linear = _linear_rgb(lightness, chroma * math.cos(_HUE), chroma * math.sin(_HUE))
    channels = [min(1.0, max(0.0, channel)) for channel in linear]
    luminance = sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    # WCAG 2: contrast with black is (l + 0.05) / 0.05, with white 1.05 / (l + 0.05).
    ink = "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
    return "#" + "".join(f"{round(255 * _gamma(channel)):02x}" for channel in channels), ink


def _cell(share: float, ends: tuple[float, float], x: float, y: float, width: float, told: str) -> list[Html]:
    colour, ink = shade((share - ends[0]) / (ends[1] - ends[0]))
    box: dict[str, str | float] = {"x": round(x, 1), "y": y, "width": round(width - 1, 1), "height": _ROW - 1}
    place: dict[str, str | float] = {"x": round(x + width / 2, 1), "y": y + 13, "text-anchor": "middle"}
    return [
        element("rect", element("title", text(told)), box | {"fill": colour}),
        element("text", text(f"{100 * share:.1f}"), place | {"class": "cell", "fill": ink}),
    ]


def _range_text(ends: tuple[float, float]) -> str:
    return f"from {100 * ends[0]:.0f} %, light, to {100 * ends[1]:.0f} %, dark"


def _linear_rgb(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """Linear sRGB values of an OKLab colour."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
