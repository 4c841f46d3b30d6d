"""The numpy scores equal scikit-learn's, and resampling is exact and reproducible."""

import numpy as np
import pytest

from efx_jax.evaluation.scores import (
    RESAMPLES,
    accuracy,
    bootstrap,
    bootstrap_mean,
    interval,
    macro_f1,
    resample_counts,
)


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_scikit_learn_on_random_predictions(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    classes = int(generator.integers(2, 25))
    rows = int(generator.integers(1, 200))
    reference, predicted = generator.integers(0, classes, (2, rows))
    assert accuracy(predicted, reference)[0] == pytest.approx(metrics.accuracy_score(reference, predicted), abs=1e-12)
    expected = metrics.f1_score(reference, predicted, average="macro", zero_division=0)
    assert macro_f1(predicted, reference, classes)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_unread_answers_equal_scikit_learn_with_the_classes_as_labels(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    classes, rows = int(generator.integers(2, 8)), 200
    reference = generator.integers(0, classes, rows)
    predicted = generator.integers(-1, classes, rows)
    expected = metrics.f1_score(reference, predicted, labels=range(classes), average="macro", zero_division=0)
    assert macro_f1(predicted, reference, classes)[0] == pytest.approx(expected, abs=1e-12)
    assert accuracy(predicted, reference)[0] == pytest.approx(metrics.accuracy_score(reference, predicted), abs=1e-12)


def test_nothing_read_is_nothing_right() -> None:
    unread, reference = np.full(4, -1), np.asarray([0, 1, 1, 0])
    assert (accuracy(unread, reference)[0], macro_f1(unread, reference, 2)[0]) == (0.0, 0.0)


def test_the_interval_of_several_runs_is_that_of_their_mean() -> None:
    generator = np.random.default_rng(1)
    reference = generator.integers(0, 3, 60)
    runs = generator.integers(0, 3, (4, 60))
    found = bootstrap(runs, reference, 3, np.arange(60))
    counts = np.concatenate(list(resample_counts(np.arange(60), RESAMPLES, seed=0)))
    means = np.mean([macro_f1(run, reference, 3, counts) for run in runs], axis=0)
    assert found["macro_f1"] == pytest.approx(interval(means))
    same, alone = (bootstrap(found, reference, 3, np.arange(60)) for found in (np.stack([runs[0]] * 4), runs[0]))
    assert same["accuracy"] == pytest.approx(alone["accuracy"])


def test_the_interval_of_a_mean_is_about_that_of_a_normal() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = bootstrap_mean(values, np.arange(400))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_a_class_that_never_occurs_does_not_count() -> None:
    predicted, reference = np.asarray([0, 1]), np.asarray([0, 1])
    assert macro_f1(predicted, reference, classes=5)[0] == 1.0
    assert macro_f1(np.asarray([0, 2]), reference, classes=5)[0] == pytest.approx(1 / 3)


def test_weighted_scores_equal_the_scores_of_the_drawn_rows() -> None:
    generator = np.random.default_rng(0)
    reference, predicted = generator.integers(0, 4, (2, 30))
    counts = np.concatenate(list(resample_counts(np.arange(30), 5, seed=1)))
    for drawn, f1, share in zip(
        counts, macro_f1(predicted, reference, 4, counts), accuracy(predicted, reference, counts), strict=True
    ):
        rows = np.repeat(np.arange(30), drawn)
        assert f1 == pytest.approx(macro_f1(predicted[rows], reference[rows], 4)[0])
        assert share == pytest.approx((predicted[rows] == reference[rows]).mean())


def test_resamples_come_in_blocks_that_add_up() -> None:
    blocks = list(resample_counts(np.arange(1_500_000), resamples=5, seed=0))
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert all((block.sum(axis=1) == 1_500_000).all() for block in blocks)


def test_the_interval_covers_the_score_and_is_reproducible() -> None:
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 3, 400)
    predicted = np.where(generator.random(400) < 0.7, reference, generator.integers(0, 3, 400))
    result = bootstrap(predicted, reference, 3, np.arange(400))
    assert result == bootstrap(predicted, reference, 3, np.arange(400))
    low, high = result["accuracy"]
    share = accuracy(predicted, reference)[0]
    assert low < share < high
    # A binomial share of 400 rows has a standard error of sqrt(p (1 - p) / 400).
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 400), rel=0.1)
    low, high = result["macro_f1"]
    assert low < macro_f1(predicted, reference, 3)[0] < high


def test_the_interval_is_the_central_95_percent() -> None:
    assert interval(np.arange(1001.0)) == (25.0, 975.0)


def test_rows_of_a_group_are_drawn_together_by_an_independent_bootstrap() -> None:
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(25), generator.integers(1, 18, 25))
    # A model that knows some contracts and not the others: rows of one group are right or wrong together.
    reference = generator.integers(0, 3, len(groups))
    predicted = np.where((generator.random(25) < 0.6)[groups], reference, (reference + 1) % 3)
    draws = [np.random.default_rng([9, draw]).integers(0, 25, 25) for draw in range(4000)]
    rows = [np.concatenate([np.flatnonzero(groups == group) for group in draw]) for draw in draws]
    shares = np.quantile([(predicted[own] == reference[own]).mean() for own in rows], [0.025, 0.975])
    f1s = np.quantile([macro_f1(predicted[own], reference[own], 3)[0] for own in rows], [0.025, 0.975])
    found = bootstrap(predicted, reference, 3, groups)
    assert found["accuracy"] == pytest.approx(shares, abs=0.015)
    assert found["macro_f1"] == pytest.approx(f1s, abs=0.015)
    assert bootstrap_mean((predicted == reference).astype(float), groups) == pytest.approx(found["accuracy"])
    low, high = bootstrap(predicted, reference, 3, np.arange(len(groups)))["accuracy"]
    assert shares[1] - shares[0] > 2 * (high - low)


def test_a_single_group_has_no_interval() -> None:
    one = np.zeros(9, int)
    assert bootstrap(one, one, 2, one) == {"accuracy": None, "macro_f1": None}
    assert bootstrap_mean(np.ones(9), one) is None
