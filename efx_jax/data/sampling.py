"""Rows drawn from a task: to learn so many of every label, each once while they last; to score a fixed sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efx_jax.data.overlap import group_numbers
from efx_jax.data.prompts import Example
from efx_jax.errors import InputError

_SAMPLE_SEED = 1234  # never that of a run: all models of a comparison are scored on the same rows


def draw(
    examples: Sequence[Example], quotas: Mapping[str, int], upsample: bool, seed: int, where: str
) -> tuple[list[Example], dict[str, Any]]:
    """Draws rows label by label.

    Args:
        examples: the rows; their label is the response without blanks around it.
        quotas: rows asked for, by label; the label "" stands for all rows, whatever their responses.
        upsample: where a label has too few rows, draw the rest with replacement; else take all of them.
        seed: chooses the rows.
        where: name of the task, for messages.

    Returns:
        The rows of one label after the other, and counts: asked, found, drawn, repeated, and the same per label.

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
    """So many rows in equal shares; the first labels get one more where they do not divide."""
    return {label: rows // len(labels) + (place < rows % len(labels)) for place, label in enumerate(labels)}


def sample_rows(examples: Sequence[Example], rows: int) -> list[Example]:
    """A fixed sample of test rows, in their order; a smaller one is part of a larger one.

    Files are often sorted, so their first rows are no sample. Rows that share a key (`group_numbers`) are drawn
    together: whole groups until there are enough rows, of which the last group gives only its first.

    Args:
        examples: the rows.
        rows: how many; 0 takes all.
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
