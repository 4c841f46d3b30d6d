"""Accuracy and macro-F1 in numpy, with bootstrap intervals, so that the core needs no metrics package.

`evaluation/metrics.py` offers the same through scikit-learn; tests check that the two agree. Classes are numbers from
0; a prediction of -1 is an answer that could not be read, which counts as wrong and is not a class.
"""

from collections.abc import Iterator

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 2000
_BLOCK = 4_000_000  # counts held at once while resampling


def accuracy(predicted: np.ndarray, reference: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Share of equal entries.

    Args:
        predicted: class numbers int [n], -1 for none.
        reference: class numbers int [n].
        counts: how often each row is drawn, [R,n]; None for once each.

    Returns:
        float64 [R], or [1] without counts.
    """
    drawn = np.ones((1, len(reference))) if counts is None else counts
    return drawn @ (predicted == reference) / drawn.sum(axis=1)


def macro_f1(
    predicted: np.ndarray, reference: np.ndarray, classes: int, counts: np.ndarray | None = None
) -> np.ndarray:
    """Unweighted mean of the classes' F1 = 2 TP / (predicted + true), over the classes that occur in either.

    This is scikit-learn's default, which leaves out a class that occurs in neither; a prediction of -1 lowers the F1 of
    its true class, as it does with scikit-learn's `labels` set to those classes.

    Args:
        predicted: class numbers int [n], -1 for none.
        reference: class numbers int [n].
        classes: number of classes.
        counts: how often each row is drawn, [R,n]; None for once each.

    Returns:
        float64 [R], or [1] without counts.
    """
    drawn = np.ones((1, len(reference))) if counts is None else counts.astype(np.float64)
    one_hot = np.eye(classes + 1, classes)  # the last row, all zeros, is for -1
    says, is_true = one_hot[predicted], one_hot[reference]
    hits, total = drawn @ (says * is_true), drawn @ says + drawn @ is_true
    f1 = 2 * hits / np.maximum(total, 1)
    return f1.sum(axis=1) / (total > 0).sum(axis=1)


def bootstrap(
    predicted: np.ndarray,
    reference: np.ndarray,
    classes: int,
    groups: np.ndarray,
) -> dict[str, Interval | None]:
    """95 % percentile intervals of accuracy and macro-F1 over resampled groups of rows (same resamples for both).

    Answers to several questions on one text are not independent, so texts are drawn, each with all its rows. For
    several runs over the same rows the interval is that of the mean over runs: every run sees the same resample.

    Args:
        predicted: class numbers int [n] or [runs,n], -1 for none.
        reference: class numbers int [n].
        classes: number of classes.
        groups: group numbers int [n], from 0.

    Returns:
        "accuracy" and "macro_f1" -> (low, high); None for a single group, which says nothing about others.
    """
    if not groups.any():
        return {"accuracy": None, "macro_f1": None}
    runs = np.atleast_2d(predicted)
    accuracies, f1s = [], []
    for counts in resample_counts(groups, RESAMPLES):
        accuracies.append(np.mean([accuracy(run, reference, counts) for run in runs], axis=0))
        f1s.append(np.mean([macro_f1(run, reference, classes, counts) for run in runs], axis=0))
    return {"accuracy": interval(np.concatenate(accuracies)), "macro_f1": interval(np.concatenate(f1s))}


def bootstrap_mean(values: np.ndarray, groups: np.ndarray) -> Interval | None:
    """95 % percentile interval of the mean of values float [n] over resampled groups int [n]; None for one group."""
    if not groups.any():
        return None
    counts = resample_counts(groups, RESAMPLES)
    return interval(np.concatenate([block @ values / block.sum(axis=1) for block in counts]))


def resample_counts(groups: np.ndarray, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each row is drawn when whole groups are drawn with replacement, as many as there are.

    Args:
        groups: group numbers int [n], from 0; a distinct number for each row resamples rows.
        resamples: number of resamples.
        seed: seed of the draws; a fixed one makes a table reproducible.

    Returns:
        Blocks int64 [r,n], whose r add up to `resamples`; counts are equal within a group.
    """
    generator = np.random.default_rng(seed)
    number = int(groups.max()) + 1
    share = np.full(number, 1 / number)
    block = max(1, _BLOCK // len(groups))
    for start in range(0, resamples, block):
        yield generator.multinomial(number, share, size=min(block, resamples - start))[:, groups]


def interval(values: np.ndarray) -> Interval:
    """The 2.5th and 97.5th percentiles."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
