"""The figures of the two ablations of scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from efx_jax.analysis import mask_overlap, score_error
from efx_jax.analysis.criteria import CRITERIA, JOINT
from efx_jax.analysis.mask_overlap import GROUPS, PAIRS, Overlap
from efx_jax.analysis.plots import Figure, Level, Series, draw_bars, draw_lines, draw_points
from efx_jax.analysis.runs import first_and_last
from efx_jax.analysis.score_error import ScoreError
from efx_jax.model.spec import LINEARS

Rows = Mapping[int, Sequence[Mapping[str, Any]]]
"""step -> rows of a summary."""

_ACTIVATIONS = ("foresight_gated", JOINT)


def draw_score_errors(folder: Path, errors: Mapping[int, Sequence[ScoreError]]) -> None:
    """Predicted over actual along training and for every layer, and how well the scores rank single entries.

    Args:
        folder: where score_error_SCORE, score_error_SCORE_layers and score_rank_STEP go, as .png and .csv.
        errors: step -> what was measured.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    rows = {step: score_error.summarise(found) for step, found in errors.items()}
    for score in CRITERIA:
        along = tuple(_ratio_series(rows, score, matrix) for matrix in LINEARS)
        figure = Figure(
            title=f"{score}: change that eq. 2 predicts over the change measured",
            x_label="training step",
            y_label="predicted / actual (geometric mean of the layers)",
            series=tuple(each for each in along if each.y),
            levels=(Level("eq. 2 is exact", 1.0),),
        )
        if figure.series:
            draw_lines(folder / f"score_error_{score}", figure)
            by_layer = tuple(_layer_series(errors[step], score, step) for step in first_and_last(rows))
            y_label = "predicted / actual (a mark per layer, stroke: median)"
            layers = replace(figure, x_label="matrix", y_label=y_label, series=by_layer)
            draw_points(folder / f"score_error_{score}_layers", layers)
    for step in first_and_last(rows):
        ranks = tuple(_rank_series(rows[step], score) for score in CRITERIA)
        title = f"Do scores put single entries in the order of what they cost? Step {step}"
        if all(each.y for each in ranks):
            y_label = "Spearman's correlation (mean of the layers)"
            draw_bars(folder / f"score_rank_{step}", Figure(title, "matrix", y_label, ranks))


def draw_overlaps(folder: Path, overlaps: Mapping[int, Sequence[Overlap]]) -> None:
    """The share of kept entries that two scores' masks have in common, along training and by matrix.

    Args:
        folder: where mask_overlap_GROUP and mask_overlap_matrices go, as .png and .csv.
        overlaps: step -> what was measured.

    Raises:
        InputError: matplotlib is not installed, or the folder is not writable.
    """
    rows = {step: mask_overlap.summarise(found) for step, found in overlaps.items()}
    last = rows[max(rows)]
    random = 100 * last[0]["random_kept"]
    for group in GROUPS:
        pairs = [_overlap_series(rows, group, first, second) for first, second in PAIRS]
        draw_lines(
            folder / f"mask_overlap_{group}",
            Figure(
                title=f"Masks of two scores, compared within {_GROUP_TEXT[group]} (random masks: {random:.0f} %)",
                x_label="training step",
                y_label="kept entries in common, % of all matrices",
                series=tuple(pairs),
            ),
        )
    draw_bars(
        folder / "mask_overlap_matrices",
        Figure(
            title=f"ForeSight's masks without the nonlinearity and with it, step {max(rows)}",
            x_label="matrix",
            y_label="kept entries in common, % (mean of the layers)",
            series=tuple(_matrix_series(last, group, second) for group in GROUPS for second in _ACTIVATIONS),
            levels=(Level("two random masks", random),),
        ),
    )


_GROUP_TEXT = {"row": "a row", "matrix": "the matrix", "bounded": "the matrix, rows bounded"}


def _ratio_series(rows: Rows, score: str, matrix: str) -> Series:
    found = [
        (step, row["ratio"])
        for step in sorted(rows)
        for row in rows[step]
        if (row["score"], row["matrix"]) == (score, matrix) and row["ratio"] is not None
    ]
    return Series(matrix, tuple(step for step, _ in found), tuple(ratio for _, ratio in found))


def _layer_series(errors: Sequence[ScoreError], score: str, step: int) -> Series:
    found = [error for error in errors if error.score == score and error.ratio]
    return Series(f"step {step}", tuple(error.matrix for error in found), tuple(error.ratio or 0.0 for error in found))


def _rank_series(rows: Sequence[Mapping[str, Any]], score: str) -> Series:
    found = [row for row in rows if row["score"] == score and row["entry_rank"] is not None]
    return Series(score, tuple(row["matrix"] for row in found), tuple(row["entry_rank"] for row in found))


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
