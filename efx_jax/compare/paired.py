"""The ratio of two models' perplexities on the same windows of text."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from efx_jax.evaluation.scores import RESAMPLES, Interval, interval, resample_counts

_HIGH = 0.975  # the upper end of a 95 % interval


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Nats, float64 [n], and number of predicted tokens, int [n], of each window of a text, and the text's checksum."""

    nll: np.ndarray
    tokens: np.ndarray
    text: str = ""


def perplexity_ratio(
    found: Mapping[int, Windows], other: Mapping[int, Windows]
) -> tuple[float, Interval | None] | None:
    """Geometric mean over seeds of perplexity(found) / perplexity(other), with its 95 % interval.

    Paired: both models see the same windows and seeds, so that what makes a window or seed hard for both does not widen
    the interval. For one seed it is a percentile bootstrap over windows. Two or three seeds are too few to resample
    (with two, such an interval would cover the truth half the time). So for several seeds the interval of the log ratio
    combines a Student's t half-width over seeds and a normal one over windows; being independent, they add in squares.

    Args:
        found: one model's windows, by seed.
        other: the other model's windows; a seed that only one of the two has is left out.

    Returns:
        The ratio and its interval (None for a single window); None if there is nothing to pair: no seed in common,
        different texts or windows, or a ratio that overflows.
    """
    value = ratio_value(found, other)
    if value is None:
        return None
    apart, tokens = _apart(found, other)
    if len(tokens) < 2:
        return value, None
    mean, blocks = apart.mean(axis=0), resample_counts(np.arange(len(tokens)), RESAMPLES)
    drawn = np.concatenate([(each @ mean) / np.maximum(each @ tokens, 1) for each in blocks])
    if len(apart) == 1:
        ends = np.asarray(interval(drawn))
    else:
        of_seeds = apart.sum(axis=1) / tokens.sum()
        student = scipy.stats.t.ppf(_HIGH, len(apart) - 1) * of_seeds.std(ddof=1) / math.sqrt(len(apart))
        normal = scipy.stats.norm.ppf(_HIGH) * drawn.std(ddof=1)
        ends = of_seeds.mean() + math.hypot(student, normal) * np.array([-1.0, 1.0])
    with np.errstate(over="ignore"):
        low, high = map(float, np.exp(ends))
    return (value, (low, high)) if math.isfinite(high) else None


def ratio_value(found: Mapping[int, Windows], other: Mapping[int, Windows]) -> float | None:
    """The ratio of `perplexity_ratio` without the interval, which takes longer."""
    shared = [number for number in found if number in other]
    if not shared or not _are_same([each[number] for each in (found, other) for number in shared]):
        return None
    apart, tokens = _apart(found, other)
    with np.errstate(over="ignore"):
        value = float(np.exp(apart.sum(axis=1).mean() / tokens.sum()))
    return value if math.isfinite(value) else None


def _apart(found: Mapping[int, Windows], other: Mapping[int, Windows]) -> tuple[np.ndarray, np.ndarray]:
    """Difference in nats per window for every shared seed, [seeds,n], and the windows' tokens [n]."""
    shared = [number for number in found if number in other]
    return np.stack([found[number].nll - other[number].nll for number in shared]), found[shared[0]].tokens


def _are_same(windows: Sequence[Windows]) -> bool:
    """Whether all of them are of one text, cut into the same windows."""
    # Evaluations from before the checksum was recorded have none.
    texts = {each.text for each in windows} - {""}
    return len(texts) <= 1 and all(np.array_equal(each.tokens, windows[0].tokens) for each in windows)
