"""What a prune event compares, reads and moves, according to its settings."""

import dataclasses
import re

from efx_jax.config import GRADIENT_SCORES, PruneConfig
from efx_jax.rounding import round_up

ACROSS_ROWS = ("matrix", "slab", "bounded")
"""Comparison groups in which entries of different rows compete."""


def n_of_m(group: str) -> tuple[int, int] | None:
    """N and M of a comparison group "N:M" (N of M consecutive inputs stay), None for any other text."""
    match = re.fullmatch(r"(\d+):(\d+)", group)
    if not match:
        return None
    kept, block = int(match[1]), int(match[2])
    return (kept, block) if 1 <= kept < block else None


def matrix_group(name: str, prune: PruneConfig) -> str:
    """The comparison group of one matrix."""
    return "row" if name in prune.row_targets and prune.group in ACROSS_ROWS else prune.group


def reads_importance(prune: PruneConfig) -> bool:
    """Whether the score reads an importance from gradients, which is passed to `prune_event`.

    That of `foresight_loss` is one factor per row: where entries compare only within rows, it has no effect.
    """
    if prune.score == "foresight_loss":
        across_rows = any(matrix_group(name, prune) in ACROSS_ROWS for name in prune.targets)
        # OWL's shares come from Wanda's scores.
        return across_rows or prune.budget == "global" or prune.ema < 1
    return prune.score in GRADIENT_SCORES


def needs_gram(prune: PruneConfig) -> bool:
    """Whether score, swaps or recovery read Gram matrices."""
    return prune.score == "sparsegpt" or prune.swaps > 0 or prune.recovery in ("gram_pbs", "admm", "obs")


def refits_base(prune: PruneConfig) -> bool:
    """Whether the recovery writes new base weights, with the adapters starting again at B = 0."""
    return prune.recovery in ("admm", "obs")


def moves_base(prune: PruneConfig) -> bool:
    """Whether an event rewrites the base weights."""
    return prune.merge_each_event or refits_base(prune)


def keeps_scores(prune: PruneConfig) -> bool:
    """Whether the moving average itself is stored: no snapshot can restore a base that has moved, or a gradient."""
    return moves_base(prune) or prune.score in GRADIENT_SCORES


def goes_by_block(prune: PruneConfig) -> bool:
    """Whether a run's events calibrate block by block, so that Grams and averages exist for one block at a time."""
    return prune.sequential or needs_gram(prune) or (prune.ema < 1 and keeps_scores(prune))


def surveyed_rows(prune: PruneConfig) -> int:
    """Calibration rows of the passes that only gradients and budgets need."""
    share = round_up(prune.survey_share * prune.calibration_rows)
    return min(max(share, len(prune.calibration)), prune.calibration_rows)


def without_recovery(prune: PruneConfig) -> PruneConfig:
    """The same event without its recovery: it only masks."""
    return dataclasses.replace(prune, recovery="none", pbs_rounds=0, dense_path=0.0)
