"""How many times the perplexity of one model another has, on the same windows of text."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from efx_jax.evaluation.scores import RESAMPLES, Interval, interval, resample_counts


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Nats, float64 [n], and predicted tokens, int [n], of every window of a text, and the text's checksum."""

    nll: np.ndarray
    tokens: np.ndarray
    text: str = ""


def perplexity_ratio(
    found: Mapping[int, Windows], other: Mapping[int, Windows], seed: int = 0
) -> tuple[float, Interval | None] | None:
    """Geometric mean over seeds of perplexity(found) / perplexity(other), with its 95 % interval.

    Percentile bootstrap, paired: both models see the same resample of windows, and of seeds where there are several, so
    that what makes a window or a seed hard for both has no part in the interval.

    Args:
        found: by seed the windows of one model.
        other: those of the other; a seed that only one of them has is left out.
        seed: of the resampling.

    Returns:
        The ratio and its interval (None of a single window); None where there is nothing to pair: no seed in common,
        another text or other windows, or a ratio too large for a number.
    """
    shared = [number for number in found if number in other]
    if not shared or not _are_same([each[number] for each in (found, other) for number in shared]):
        return None
    tokens = found[shared[0]].tokens
    apart = np.stack([found[number].nll - other[number].nll for number in shared])
    with np.errstate(over="ignore"):
        value = float(np.exp(apart.sum(axis=1).mean() / tokens.sum()))
    if not np.isfinite(value):
        return None
    if len(tokens) < 2:
        return value, None
    draws = np.concatenate(list(resample_counts(np.arange(len(tokens)), RESAMPLES, seed)))
    seeds = np.concatenate(list(resample_counts(np.arange(len(shared)), RESAMPLES, seed + 1)))
    # Tokens of the drawn windows are those of every drawn seed.
    sums = np.einsum("rw,sw,rs->r", draws, apart, seeds) / len(shared)
    with np.errstate(over="ignore"):
        ratios = np.exp(sums / np.maximum(draws @ tokens, 1))
    return (value, interval(ratios)) if np.isfinite(ratios).all() else None


def _are_same(windows: Sequence[Windows]) -> bool:
    """Whether all of them are of one text, cut alike."""
    # Evaluations of before it was told have no checksum.
    texts = {each.text for each in windows} - {""}
    return len(texts) <= 1 and all(np.array_equal(each.tokens, windows[0].tokens) for each in windows)
