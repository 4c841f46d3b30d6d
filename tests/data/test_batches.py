"""Batch n depends on (seed, n) alone, shifts targets once and never weights padding."""

import collections
from collections.abc import Callable

import numpy as np
import pytest

from efx_jax.data.batches import (
    Batch,
    batch_rows,
    bucket_length,
    bucketed_batch,
    calibration_batches,
    make_batch,
    rows_within_budget,
)
from efx_jax.data.tokens import Tokenized
from efx_jax.errors import InputError


def sequences(*lengths: int) -> list[Tokenized]:
    """Row i holds tokens 100 i + 1, 100 i + 2, ...; the second half carries loss."""
    return [Tokenized(100 * i + 1 + np.arange(n), np.arange(n) >= n // 2) for i, n in enumerate(lengths)]


def test_a_batch_is_a_pure_function_of_seed_and_number() -> None:
    rows = sequences(*range(2, 20))
    later_first = {n: make_batch(rows, 7, n, 4) for n in (5, 0, 3)}
    for n, batch in later_first.items():
        for name, array in make_batch(rows, 7, n, 4).items():
            np.testing.assert_array_equal(array, batch[name])
    assert not np.array_equal(batch_rows(18, 7, 0, 18), batch_rows(18, 8, 0, 18))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (3, 8), (7, 7), (5, 1)])
def test_every_epoch_visits_every_row_once_though_batches_cross_it(count: int, batch_size: int) -> None:
    stream = np.concatenate([batch_rows(count, 1, n, batch_size) for n in range(3 * count)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    if count > 4:
        assert not np.array_equal(stream[:count], stream[count : 2 * count])


def test_targets_are_shifted_once_and_padding_has_no_weight() -> None:
    batch = make_batch(sequences(4), 0, 0, 1, length=6)
    assert batch["tokens"].tolist() == [[1, 2, 3, 0, 0, 0]]
    assert batch["targets"].tolist() == [[2, 3, 4, 0, 0, 0]]
    assert batch["weights"].tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    assert batch["lengths"].tolist() == [3]
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "lengths": "int32",
    }


def test_a_token_equal_to_the_padding_value_keeps_its_weight() -> None:
    zeros = Tokenized(np.zeros(3, np.int32), np.asarray([False, True, True]))
    assert make_batch([zeros], 0, 0, 1, length=4)["weights"].tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_buckets_fit_and_are_few() -> None:
    lengths = range(1, 1025)
    sizes = [bucket_length([n], 1024) for n in lengths]
    assert all(size >= n for size, n in zip(sizes, lengths, strict=True))
    assert sorted(set(sizes)) == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert bucket_length([450], 480) == 480
    assert bucket_length([449], 450) == 480
    assert bucket_length([130, 3], 4096, multiple=128) == 256


def test_a_batch_takes_the_bucket_of_its_own_rows() -> None:
    rows = sequences(10, 200)
    widths = {make_batch(rows, 0, n, 1)["tokens"].shape[1] for n in range(4)}
    assert widths == {32, 224}
    with pytest.raises(InputError, match="199 inputs"):
        make_batch(rows, 0, 0, 2, length=64)
    with pytest.raises(InputError, match="at least one example"):
        make_batch([], 0, 0, 2)


def numbers(batch: dict[str, np.ndarray]) -> list[int]:
    """The sequences in a batch: tokens of sequence i begin with 100 i + 1."""
    return [int(tokens[0]) // 100 for tokens in batch["tokens"]]


@pytest.mark.parametrize(("count", "batch_size"), [(300, 4), (37, 4), (3, 8), (7, 7)])
def test_every_epoch_of_buckets_visits_every_row_once_though_batches_cross_it(count: int, batch_size: int) -> None:
    rows = sequences(*np.random.default_rng(0).integers(2, 90, count))
    batches = [bucketed_batch(rows, 1, n, batch_size, multiple=8) for n in range(3 * count // batch_size + 1)]
    stream = [number for batch in batches for number in numbers(batch)]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    if count > 2 * batch_size:
        assert stream[:count] != stream[count : 2 * count]


def test_a_bucketed_batch_holds_rows_of_like_length_and_the_batches_come_shuffled() -> None:
    rows = sequences(*np.random.default_rng(0).integers(2, 600, 400))
    found = [bucketed_batch(rows, 0, n, 8) for n in range(50)]
    spreads = [batch["lengths"].max() - batch["lengths"].min() for batch in found]
    assert np.mean(spreads) < 20
    widths = [batch["tokens"].shape[1] for batch in found]
    assert set(widths) == {128, 256, 384, 512, 640}
    assert all(batch["lengths"].max() > width - 128 for batch, width in zip(found, widths, strict=True))
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_a_bucketed_batch_is_a_pure_function_of_seed_and_number() -> None:
    rows = sequences(*range(2, 60))
    later_first = {n: bucketed_batch(rows, 7, n, 4) for n in (35, 0, 3)}
    for n, batch in later_first.items():
        for name, array in bucketed_batch(rows, 7, n, 4).items():
            np.testing.assert_array_equal(array, batch[name])
    assert numbers(later_first[0]) != numbers(bucketed_batch(rows, 8, 0, 4))
    with pytest.raises(InputError, match="at least one example"):
        bucketed_batch([], 0, 0, 2)


@pytest.mark.parametrize("build", [make_batch, bucketed_batch])
def test_a_host_lays_out_its_rows_alone_at_the_length_of_the_whole_batch(build: Callable[..., Batch]) -> None:
    lengths = np.random.default_rng(0).integers(2, 400, 40)
    rows = sequences(*lengths)
    whole = build(rows, 0, 3, 8)
    for part in (slice(0, 4), slice(4, 8), slice(1, 8, 3)):
        for name, array in build(rows, 0, 3, 8, rows=part).items():
            np.testing.assert_array_equal(array, whole[name][part])


def test_a_pass_takes_the_largest_divisor_of_the_batch_within_the_budget() -> None:
    assert rows_within_budget(16, 128, 16 * 128) == 16
    assert rows_within_budget(16, 128, 16 * 128 - 1) == 8
    assert rows_within_budget(12, 100, 500) == 4
    assert rows_within_budget(16, 2048, 100) == 1
    assert rows_within_budget(24, 100, 1000, shards=4) == 8
    assert rows_within_budget(24, 100, 100, shards=4) == 4
    with pytest.raises(InputError, match="5 shards"):
        rows_within_budget(24, 100, 100, shards=5)


def test_calibration_draws_whole_rows_without_replacement() -> None:
    rows = sequences(*range(2, 102))
    batches = list(calibration_batches(rows, seed=3, rows=51, length=90, batch_tokens=256))
    shapes = {batch["tokens"].shape for batch in batches}
    assert shapes == {(2, 96), (4, 64), (8, 32)}
    drawn = collections.Counter()
    for batch in batches:
        for tokens, length in zip(batch["tokens"], batch["lengths"], strict=True):
            if length:
                row = int(tokens[0]) // 100
                drawn[row] += 1
                np.testing.assert_array_equal(tokens[:length], rows[row].tokens[:-1][:90])
                assert not tokens[length:].any()
    assert len(drawn) == 51
    assert set(drawn.values()) == {1}


def test_a_calibration_row_longer_than_the_budget_stands_alone() -> None:
    (batch,) = calibration_batches(sequences(100), seed=0, rows=1, length=64, batch_tokens=10)
    assert batch["tokens"].shape == (1, 64)
    assert batch["lengths"].tolist() == [64]


def test_calibration_with_few_rows_takes_all_of_them() -> None:
    (batch,) = calibration_batches(sequences(5, 3), seed=0, rows=128, length=2048, batch_tokens=128)
    assert batch["lengths"].tolist() == [4, 2, 0, 0]
    assert batch["tokens"].shape == (4, 32)
    with pytest.raises(InputError, match="calibration"):
        list(calibration_batches([], 0, 1, 8, 1))
