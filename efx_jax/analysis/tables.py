"""The tables that the command prints, and what it writes next to the figures."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis.mask_overlap import GROUPS
from efx_jax.analysis.runs import first_and_last
from efx_jax.evaluation.results import markdown_table
from efx_jax.files import atomic_write
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

_SUBSPACES = {"share": "distance / random", "share_least": "least", "share_most": "most", "distance": "distance, rad"}
_IN_COMMON = {
    "kept": "kept too %",
    "random_kept": "random %",
    "pruned": "pruned too %",
    "random_pruned": "random pruned %",
    "beyond_chance": "beyond chance %",
}
_STUDIES: Mapping[str, Mapping[str, str]] = {
    "subspaces": {"first": "run", "second": "and", "shift": "shift", "matrix": "matrix", **_SUBSPACES},
    "mask_runs": {"first": "run", "second": "and", "shift": "shift", "matrix": "matrix", **_IN_COMMON},
    "curves": {
        "run": "run",
        "steps": "steps",
        "loss_first": "loss, first",
        "loss_last": "last",
        "entropy_first": "entropy, first",
        "entropy_last": "last",
    },
    "adapter_base": {
        "matrix": "matrix",
        **_SUBSPACES,
        "random": "random, rad",
        "adapter_energy": "adapter in base %",
        "base_energy": "base in adapter %",
        "leading_energy": "base in its own %",
        "random_energy": "random %",
    },
    "sparsity": {
        "matrix": "matrix",
        "sparsity": "zeros %",
        "sparsity_least": "least layer %",
        "sparsity_most": "most layer %",
        "row_least": "fullest row %",
        "row_most": "emptiest row %",
        "empty_rows": "empty rows",
        "empty_columns": "empty columns",
    },
    "mask_events": {"first": "masks of", "second": "and of", "matrix": "matrix", **_IN_COMMON},
    "scores": {
        "matrix": "matrix",
        "across": "across the threshold %",
        "across_least": "least layer %",
        "across_most": "most layer %",
    },
    "recovery": {
        "matrix": "matrix",
        "error_masked": "mask alone, error %",
        "error_recovered": "with recovery %",
        "error_recovered_least": "least layer %",
        "error_recovered_most": "most layer %",
        "moved": "kept entries moved %",
        "move_norm": "norm of the move %",
    },
    "moved": {
        "matrix": "matrix",
        "moved": "kept entries moved %",
        "norm": "norm of the move %",
        "norm_least": "least layer %",
        "norm_most": "most layer %",
        "event_norm": "by events %",
        "training_norm": "by adapters %",
    },
}
"""Analysis -> key of its summary -> column heading; keys with a heading in percent are shares."""


def study_table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of a study's summary."""
    titles = _STUDIES[name]
    return markdown_table(
        list(titles.values()), [[_number(row.get(key), title) for key, title in titles.items()] for row in rows]
    )


def write_study(
    folder: Path,
    name: str,
    asked: Mapping[str, Any],
    summary: Sequence[Mapping[str, Any]],
    records: Sequence[Any],
    table: str,
) -> None:
    """Writes FOLDER/NAME.json (what was looked at, the summary, every record), NAME_records.csv (their plain numbers)
    and NAME.md.

    Args:
        folder: output folder; created if needed.
        name: the study's name.
        asked: what was looked at.
        summary: JSON-serialisable rows.
        records: frozen dataclasses of one kind.
        table: Markdown.

    Raises:
        InputError: the disk is full or the folder is not writable.
    """
    found = [dataclasses.asdict(record) for record in records]
    whole = {"asked": asked, "summary": summary, "records": found}
    atomic_write(folder / f"{name}.json", json.dumps(whole, indent=1) + "\n")
    write_records(folder, name, found)
    atomic_write(folder / f"{name}.md", table + "\n")


def write_records(folder: Path, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes FOLDER/NAME_records.csv: the plain values of one or more records of one kind."""
    numbers = io.StringIO()
    plain = [key for key, value in records[0].items() if not isinstance(value, tuple)]
    writer = csv.DictWriter(numbers, plain, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    atomic_write(folder / f"{name}_records.csv", numbers.getvalue())


def _number(value: Any, title: str) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.4g}" if title.endswith("%") else f"{value:.4g}"


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
