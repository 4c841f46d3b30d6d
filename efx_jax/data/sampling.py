"""Rows drawn from a task: for training, a number per label, repeated only if needed; for scoring, a fixed sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efx_jax.data.overlap import group_numbers
from efx_jax.data.prompts import Example
from efx_jax.errors import InputError

_SAMPLE_SEED = 1234  # independent of the run's seed: all models of a comparison are scored on the same rows


def draw(
    examples: Sequence[Example], quotas: Mapping[str, int], upsample: bool, seed: int, where: str
) -> tuple[list[Example], dict[str, Any]]:
    """Draws rows label by label.

    Args:
        examples: the rows; their label is the response without surrounding blanks.
        quotas: rows requested, by label; the label "" stands for all rows, whatever their responses.
        upsample: if a label has too few rows, draw the rest with replacement; otherwise just take all of its rows.
        seed: chooses the rows.
        where: name of the task, for messages.

    Returns:
        The rows, label after label, and counts: asked, found, drawn, repeated, and the same per label.

    Raises:
        InputError: a label without any row.
    """
    drawn: list[Example] = []
    counts: dict[str, dict[str, int]] = {}
    for place, (label, asked) in enumerate(quotas.items()):
        pool = [example for example in examples if not label or example.response.strip() == label]
        if not pool:
            raise InputError(f"{where}: no training row has the label {label!r}; expected some; leave it out of labels")
        chosen = _choose(len(pool), asked, upsample, np.random.default_rng([seed, place]))
        drawn += [pool[row] for row in chosen]
        repeated = max(0, len(chosen) - len(pool))
        counts[label] = {"asked": asked, "found": len(pool), "drawn": len(chosen), "repeated": repeated}
    names = ("asked", "found", "drawn", "repeated")
    total: dict[str, Any] = {name: sum(count[name] for count in counts.values()) for name in names}
    return drawn, total | ({} if "" in counts else {"labels": counts})


def equal_quotas(rows: int, labels: Sequence[str]) -> dict[str, int]:
    """Splits `rows` equally among the labels; if it does not divide evenly, the first labels get one more."""
    return {label: rows // len(labels) + (place < rows % len(labels)) for place, label in enumerate(labels)}


def sample_rows(examples: Sequence[Example], rows: int) -> list[Example]:
    """A fixed sample of test rows, in their original order; a smaller sample is part of a larger one.

    Files are often sorted, so their first rows are not a sample. Rows that share a key (`group_numbers`) are drawn
    together: whole groups until there are enough rows; the last group contributes only its first rows.

    Args:
        examples: the rows.
        rows: number of rows; 0 takes all.
    """
    if not rows or rows >= len(examples):
        return list(examples)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(group_numbers(examples)):
        members.setdefault(group, []).append(row)
    order = np.random.default_rng(_SAMPLE_SEED).permutation(len(members))
    drawn = [row for group in order for row in members[int(group)]][:rows]
    return [examples[row] for row in sorted(drawn)]


def _choose(count: int, asked: int, upsample: bool, generator: np.random.Generator) -> list[int]:
    once = generator.permutation(count)[:asked].tolist()
    missing = max(0, asked - count) if upsample else 0
    return once + generator.integers(count, size=missing).tolist()
