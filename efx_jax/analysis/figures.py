"""The figures of the two ablations of scores, from the rows that their `summarise` functions give."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis.criteria import CRITERIA, JOINT
from efx_jax.analysis.mask_overlap import GROUPS, PAIRS
from efx_jax.analysis.plots import Figure, Level, Series, draw_bars, draw_lines
from efx_jax.model.spec import LINEARS

Rows = Mapping[int, Sequence[Mapping[str, Any]]]
"""step -> rows of a summary."""

_ACTIVATIONS = ("foresight_gated", JOINT)


def draw_score_errors(folder: Path, rows: Rows) -> None:
    """Predicted over actual along training, a figure per score; and how well the scores rank single entries.

    Args:
        folder: where score_error_SCORE and score_error_rank go, as .png and .csv.
        rows: of `score_error.summarise`, by step.

    Raises:
        InputError: matplotlib is not installed, or the place is not writable.
    """
    for score in CRITERIA:
        series = tuple(_ratio_series(rows, score, matrix) for matrix in LINEARS)
        figure = Figure(
            title=f"{score}: change that eq. 2 predicts over the change measured",
            x_label="training step",
            y_label="predicted / actual (mean, least and most of the layers)",
            series=tuple(each for each in series if each.y),
            levels=(Level("eq. 2 is exact", 1.0),),
        )
        if figure.series:
            draw_lines(folder / f"score_error_{score}", figure)
    ends = sorted({min(rows), max(rows)})
    ranks = [_rank_series(rows[step], score, step) for step in ends for score in CRITERIA]
    if any(each.y for each in ranks):
        draw_bars(
            folder / "score_error_rank",
            Figure(
                title="Do scores put single entries in the order of what they cost?",
                x_label="matrix",
                y_label="Spearman's correlation (mean of the layers)",
                series=tuple(each for each in ranks if each.y),
            ),
        )


def draw_overlaps(folder: Path, rows: Rows) -> None:
    """The share of kept entries that two scores' masks have in common, along training and by matrix.

    Args:
        folder: where mask_overlap_GROUP and mask_overlap_matrices go, as .png and .csv.
        rows: of `mask_overlap.summarise`, by step.

    Raises:
        InputError: matplotlib is not installed, or the place is not writable.
    """
    last = rows[max(rows)]
    chance = Level("two random masks", 100 * last[0]["random_kept"])
    for group in GROUPS:
        pairs = [_overlap_series(rows, group, first, second) for first, second in PAIRS]
        draw_lines(
            folder / f"mask_overlap_{group}",
            Figure(
                title=f"Masks of two scores, compared within {_GROUP_TEXT[group]}",
                x_label="training step",
                y_label="kept entries in common, % (mean of the matrices)",
                series=tuple(pairs),
                levels=(chance,),
            ),
        )
    draw_bars(
        folder / "mask_overlap_matrices",
        Figure(
            title=f"ForeSight's masks without the nonlinearity and with it, step {max(rows)}",
            x_label="matrix",
            y_label="kept entries in common, % (mean of the layers)",
            series=tuple(_matrix_series(last, group, second) for group in GROUPS for second in _ACTIVATIONS),
            levels=(chance,),
        ),
    )


_GROUP_TEXT = {"row": "a row", "matrix": "the matrix", "bounded": "the matrix, rows bounded"}


def _ratio_series(rows: Rows, score: str, matrix: str) -> Series:
    found = [
        (step, row)
        for step in sorted(rows)
        for row in rows[step]
        if (row["score"], row["matrix"]) == (score, matrix) and row["ratio"] is not None
    ]
    return Series(
        label=matrix,
        x=tuple(step for step, _ in found),
        y=tuple(row["ratio"] for _, row in found),
        low=tuple(row["ratio_least"] for _, row in found),
        high=tuple(row["ratio_most"] for _, row in found),
    )


def _rank_series(rows: Sequence[Mapping[str, Any]], score: str, step: int) -> Series:
    found = [row for row in rows if row["score"] == score and row["entry_rank"] is not None]
    return Series(
        label=f"{score}, step {step}",
        x=tuple(row["matrix"] for row in found),
        y=tuple(row["entry_rank"] for row in found),
    )


def _overlap_series(rows: Rows, group: str, first: str, second: str) -> Series:
    found = [
        (step, row["kept"])
        for step in sorted(rows)
        for row in rows[step]
        if (row["group"], row["first"], row["second"], row["matrix"]) == (group, first, second, "all")
    ]
    return Series(
        label=f"{first} and {second}",
        x=tuple(step for step, _ in found),
        y=tuple(100 * kept for _, kept in found),
    )


def _matrix_series(rows: Sequence[Mapping[str, Any]], group: str, second: str) -> Series:
    found = [row for row in rows if (row["group"], row["first"], row["second"]) == (group, "foresight", second)]
    return Series(
        label=f"{group}: {second}",
        x=tuple(row["matrix"] for row in found),
        y=tuple(100 * row["kept"] for row in found),
    )
