"""The tables that the command prints: the first step beside the last."""

from collections.abc import Mapping, Sequence
from typing import Any

from efx_jax.analysis.mask_overlap import GROUPS
from efx_jax.analysis.runs import first_and_last
from efx_jax.evaluation.results import markdown_table
from efx_jax.model.spec import LINEARS

Rows = Mapping[int, Sequence[Mapping[str, Any]]]
"""step -> rows of a summary."""

_ERRORS = {
    "ratio": "predicted / actual",
    "ratio_least": "least layer",
    "ratio_most": "most layer",
    "entry_ratio": "of one entry",
    "entry_rank": "rank of entries",
    "layer_rank": "rank of layers",
    "nll": "nll +",
}


def score_error_table(rows: Rows) -> str:
    """A Markdown table: a row per matrix, score and step (first, last), see `score_error.summarise`."""
    steps = first_and_last(rows)
    lines = [
        [row["matrix"], row["score"], str(step), *(_cell(row[key], key) for key in _ERRORS)]
        for several in zip(*(rows[step] for step in steps), strict=True)
        for step, row in zip(steps, several, strict=True)
    ]
    return markdown_table(["matrix", "score", "step", *_ERRORS.values()], lines)


def overlap_table(rows: Rows) -> str:
    """A Markdown table: kept entries in common in percent, a row per group, pair of scores and step (first, last)."""
    steps = first_and_last(rows)
    lines: dict[tuple[str, str, int], list[str]] = {}
    random = ""
    for step in steps:
        for row in rows[step]:
            key = (row["group"], f"{row['first']}, {row['second']}", step)
            lines.setdefault(key, []).append(_percent(row["kept"]))
            random = f"{_percent(row['random_kept'])}"
    header = ["group", "masks", "step", *(name.removesuffix("_proj") for name in LINEARS), "all", "random"]
    return markdown_table(header, [[*map(str, key), *lines[key], random] for key in sorted(lines, key=_by_group)])


def _by_group(key: tuple[str, str, int]) -> tuple[int, str, int]:
    return GROUPS.index(key[0]), key[1], key[2]


def _cell(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if "ratio" in key else f"{value:.4f}" if key == "nll" else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
