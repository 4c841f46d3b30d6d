"""Batches as every host and device gets them: parts of the one batch that a single device would get."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efx_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from efx_jax.data.batches import batch_rows
from efx_jax.data.tokens import Tokenized
from efx_jax.parallel.mesh import make_mesh
from efx_jax.training.feed import distant_batch, epoch_rows, host_batch, mesh_batch, rows_per_pass

BATCHING = ("padding", "buckets", "packing")


@pytest.fixture(scope="module")
def examples() -> list[Tokenized]:
    """50 sequences of 5 to 200 inputs."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(6, 202, 50)
    return [Tokenized(rng.integers(1, 99, size).astype(np.int32), np.arange(size) > 2) for size in lengths]


def config_of(batching: Any, batch_size: int = 16, **train: int) -> Config:
    return Config(
        data=DataConfig(batching=batching, max_length=256), train=TrainConfig(batch_size=batch_size, **train), seed=3
    )


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("number", [0, 3, 11])
def test_a_hosts_rows_are_those_of_the_whole_batch(batching: str, number: int, examples: list[Tokenized]) -> None:
    """Also where the batch crosses into the next epoch, and where the longest row is another host's."""
    config = config_of(batching)
    whole = host_batch(config, examples, number)
    longest = int(whole["lengths"].argmax())
    for rows in (slice(0, 4), slice(4, 16), slice(longest + 1, 16), slice(0, longest)):
        assert_same(host_batch(config, examples, number, rows), {name: array[rows] for name, array in whole.items()})


@pytest.mark.parametrize("size", [1, 2, 5, 10, 25])
def test_a_distant_batch_has_other_rows_of_the_same_epoch(size: int) -> None:
    for number in range(3 * 50 // size):
        other = distant_batch(number, 50, size)
        assert other != number and other * size // 50 == number * size // 50
        assert not set(batch_rows(50, 3, number, size)) & set(batch_rows(50, 3, other, size))


def test_a_distant_batch_is_there_where_an_epoch_hardly_fills_one() -> None:
    found = [[distant_batch(number, rows, 4) for number in range(5)] for rows in (3, 4, 7)]
    assert all(other >= 0 and other != number for others in found for number, other in enumerate(others))


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
def test_the_devices_hold_the_batch_between_them(
    batching: str, shape: tuple[int, int, int], examples: list[Tokenized]
) -> None:
    config = config_of(batching)
    found = mesh_batch(config, examples, 2, make_mesh(MeshConfig(*shape)))
    assert_same(found, host_batch(config, examples, 2))
    shards = found["tokens"].addressable_shards
    assert {shard.data.shape[0] for shard in shards} == {16 // (shape[0] * shape[1])}


@pytest.mark.parametrize("batching", ["padding", "buckets"])
def test_every_sequence_comes_once_in_an_epoch(batching: str, examples: list[Tokenized]) -> None:
    config = config_of(batching, batch_size=10)
    assert epoch_rows(config, examples) == 50
    rows = [row[:length].tobytes() for n in range(5) for row, length in _rows(host_batch(config, examples, n))]
    assert sorted(rows) == sorted(example.tokens[:-1].tobytes() for example in examples)


def test_packing_counts_an_epoch_in_packed_rows(examples: list[Tokenized]) -> None:
    config = config_of("packing", batch_size=1)
    count = epoch_rows(config, examples)
    segments = sum(int(host_batch(config, examples, n)["segments"].max()) for n in range(count))
    assert segments == 50 and count < 50


def _rows(batch: dict[str, np.ndarray]) -> Any:
    return zip(batch["tokens"], batch["lengths"], strict=True)


@pytest.mark.parametrize(
    ("train", "mesh", "length", "expected"),
    [
        ({}, MeshConfig(), 128, 16),
        ({"micro_batch": 4}, MeshConfig(), 128, 4),
        ({"micro_tokens": 1024}, MeshConfig(), 128, 8),
        ({"micro_tokens": 1024}, MeshConfig(), 256, 4),
        ({"micro_tokens": 1000}, MeshConfig(), 128, 4),
        ({"micro_batch": 4, "micro_tokens": 4096}, MeshConfig(), 128, 4),
        ({"micro_tokens": 1024}, MeshConfig(data=2, fsdp=2, tensor=2), 256, 4),
        # Not even a row fits the budget: one row on each device that takes part.
        ({"micro_tokens": 5}, MeshConfig(), 128, 1),
        ({"micro_tokens": 5}, MeshConfig(data=2, fsdp=2, tensor=2), 128, 4),
    ],
)
def test_a_pass_has_the_rows_that_its_tokens_allow(
    train: dict[str, int], mesh: MeshConfig, length: int, expected: int
) -> None:
    config = dataclasses.replace(config_of("padding", **train), mesh=mesh)
    assert rows_per_pass(config, length) == expected


def test_a_token_budget_splits_the_batch_and_changes_no_loss(
    launch: Callable[..., Path], tmp_path: Path, metrics_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows padded to 32 tokens: a budget of 40 takes them one by one."""
    import efx_jax.training.step as step_module

    options = step_module.StepOptions
    used: list[int] = []

    def remember(**settings: Any) -> Any:
        used.append(settings["micro_batches"])
        return options(**settings)

    monkeypatch.setattr(step_module, "StepOptions", remember)
    flags = ("--prune.sparsity", "0", "--train.steps", "3", "--data.test", "", "--data.holdout", "0")
    whole = launch(tmp_path / "whole", *flags)
    split = launch(tmp_path / "split", *flags, "--train.micro_tokens", "40")
    assert used == [1] * 3 + [2] * 3
    for key in ("loss", "grad_norm", "entropy"):
        found, expected = ([row[key] for row in metrics_of(run)] for run in (split, whole))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=key)


def test_batches_of_like_length_train(launch: Callable[..., Path], tmp_path: Path, metrics_of: Any) -> None:
    flags = ("--prune.sparsity", "0", "--train.steps", "3", "--data.test", "", "--data.holdout", "0")
    run = launch(tmp_path / "run", *flags, "--data.batching", "buckets")
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
