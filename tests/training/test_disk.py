"""The room that a run needs on its disk, by hand on a tiny model; and what happens where there is less."""

import dataclasses
import shutil
import types
import warnings
from pathlib import Path

import pytest

from efx_jax.config import Config, EvalConfig, LoraConfig, PruneConfig, TrainConfig
from efx_jax.errors import InputError
from efx_jax.model.spec import LINEARS, linear_shapes
from efx_jax.training.accounting import count_parameters
from efx_jax.training.disk import disk_bytes, refuse_small_disk
from tests.tiny import LLAMA

CONFIG = Config(
    lora=LoraConfig(rank=2),
    prune=PruneConfig(recovery="admm", ema=1.0),
    train=TrainConfig(keep=3, checkpoint_every=10),
)
SHAPES = linear_shapes(LLAMA)
ADAPTERS = 4 * LLAMA.num_layers * sum(2 * sum(SHAPES[name]) for name in CONFIG.lora.targets)
MASKS = LLAMA.num_layers * sum(out_dim * -(-in_dim // 8) for out_dim, in_dim in SHAPES.values())
LINEAR_ENTRIES = LLAMA.num_layers * sum(out_dim * in_dim for out_dim, in_dim in SHAPES.values())


def test_checkpoints_hold_what_has_moved_and_one_more_than_is_kept_exists_for_a_moment() -> None:
    found = disk_bytes(LLAMA, CONFIG, "bfloat16", events=[10], steps=100)
    moved = 2 * LINEAR_ENTRIES
    assert len(SHAPES) == len(LINEARS)
    assert found["checkpoints"] == 4 * (3 * ADAPTERS + MASKS + moved) and found["best model"] == 0
    assert found["export"] == 2 * count_parameters(LLAMA, CONFIG).total
    # Before an event the base is where it was: only what is saved behind it holds one.
    late = disk_bytes(LLAMA, CONFIG, "bfloat16", events=[100], steps=100)
    assert late["checkpoints"] == 4 * 3 * ADAPTERS + 2 * (MASKS + moved)


def test_a_base_that_stays_is_saved_once_and_a_short_run_saves_seldom() -> None:
    stays = dataclasses.replace(CONFIG, prune=PruneConfig(score="wanda", recovery="none", ema=1.0))
    found = disk_bytes(LLAMA, stays, "float32", events=[1], steps=9)
    assert found["checkpoints"] == 2 * (3 * ADAPTERS + MASKS)
    best = dataclasses.replace(stays, eval=EvalConfig(best="perplexity", every=3))
    assert disk_bytes(LLAMA, best, "float32", events=[1], steps=9)["best model"] == found["checkpoints"]


def test_an_average_of_scores_that_is_kept_as_it_is_counts() -> None:
    averaging = dataclasses.replace(CONFIG, prune=PruneConfig(recovery="admm", ema=0.5))
    more = disk_bytes(LLAMA, averaging, "float32", events=[0, 8], steps=9)["checkpoints"]
    once = disk_bytes(LLAMA, CONFIG, "float32", events=[0, 8], steps=9)["checkpoints"]
    assert more - once == 3 * 4 * LINEAR_ENTRIES


def test_a_disk_that_is_too_small_is_refused_and_one_that_may_be_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "mine"
    room = 2**30
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=room) if place else None)
    parts = {"checkpoints": 2 * 2**30, "best model": 0, "export": 2**29}
    with pytest.raises(InputError, match=r"mine: .* up to 2.5 GiB \(checkpoints 2.0, export 0.5\), .* for 1.0; make"):
        refuse_small_disk(parts, run)
    room = 2 * 2**30
    with pytest.warns(UserWarning, match="room for 2.0"):
        refuse_small_disk(parts, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_small_disk({"export": room}, run)
        # What an earlier attempt has written need not be found again.
        run.mkdir(parents=True)
        (run / "half").write_bytes(b"x" * 1000)
        refuse_small_disk({"export": room + 1000}, run)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
