"""Accuracy and macro-F1 in numpy, with bootstrap intervals: what the core needs without any metrics package.

`evaluation/metrics.py` offers the same through scikit-learn; the tests hold the two equal.
"""

from collections.abc import Iterator

import numpy as np

_BLOCK = 4_000_000  # counts held at once while resampling


def accuracy(predicted: np.ndarray, reference: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Share of equal entries.

    Args:
        predicted: class numbers int [n].
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

    This is scikit-learn's default, which leaves out a class that occurs in neither.

    Args:
        predicted: class numbers int [n].
        reference: class numbers int [n].
        classes: number of classes.
        counts: how often each row is drawn, [R,n]; None for once each.

    Returns:
        float64 [R], or [1] without counts.
    """
    drawn = np.ones((1, len(reference))) if counts is None else counts.astype(np.float64)
    one_hot = np.eye(classes)
    says, is_true = one_hot[predicted], one_hot[reference]
    hits, total = drawn @ (says * is_true), drawn @ says + drawn @ is_true
    f1 = 2 * hits / np.maximum(total, 1)
    return f1.sum(axis=1) / (total > 0).sum(axis=1)


def bootstrap(
    predicted: np.ndarray, reference: np.ndarray, classes: int, resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of accuracy and macro-F1 over resampled rows (same resamples for both).

    Args:
        predicted: class numbers int [n].
        reference: class numbers int [n].
        classes: number of classes.
        resamples: number of resamples, at least 1,000 for stable ends.
        seed: fixed, so that a table is reproducible.

    Returns:
        "accuracy" and "macro_f1" -> (low, high).
    """
    accuracies, f1s = [], []
    for counts in resample_counts(len(reference), resamples, seed):
        accuracies.append(accuracy(predicted, reference, counts))
        f1s.append(macro_f1(predicted, reference, classes, counts))
    return {"accuracy": interval(np.concatenate(accuracies)), "macro_f1": interval(np.concatenate(f1s))}


def resample_counts(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `rows` rows is drawn in resamples with replacement: blocks int64 [r,rows] with all r adding up
    to `resamples`."""
    generator = np.random.default_rng(seed)
    share = np.full(rows, 1 / rows)
    block = max(1, _BLOCK // rows)
    for start in range(0, resamples, block):
        yield generator.multinomial(rows, share, size=min(block, resamples - start))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
