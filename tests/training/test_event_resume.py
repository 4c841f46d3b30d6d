"""An event that is cut off between two blocks goes on from the finished ones, to the same bits."""

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import Config, LoraConfig, MeshConfig, ModelConfig, PruneConfig, TrainConfig
from efx_jax.config_event import moves_base
from efx_jax.parallel.mesh import make_mesh
from efx_jax.pruning import blockwise
from efx_jax.training import checkpoint, events
from efx_jax.training.schedule import Event
from efx_jax.training.state import RunState
from tests.tiers import few_of
from tests.tiny import LLAMA
from tests.training.before_event import start

pytestmark = pytest.mark.slow

LAYERS = 4
SPEC = dataclasses.replace(LLAMA, intermediate_size=32, num_layers=LAYERS)
SOME = ("k_proj", "down_proj")
# Mesh and event. The average of ADMM is kept on the host, that of Gram surgery is rebuilt from snapshots.
EVENTS = {
    "Gram surgery on pruned inputs": ((1, 1, 1), PruneConfig(recovery="gram_pbs", sequential=True)),
    "ADMM with memory": ((1, 1, 1), PruneConfig(recovery="admm", ema=0.5)),
    "Gram surgery with memory": ((1, 1, 1), PruneConfig(recovery="gram_pbs", ema=0.5, score="foresight_gated")),
    "SparseGPT with layer budgets": (
        (1, 1, 1),
        PruneConfig(score="sparsegpt", group="matrix", recovery="obs", budget="owl", owl_multiple=2.0, targets=SOME),
    ),
    "ADMM towards the dense path": ((1, 1, 1), PruneConfig(recovery="admm", sequential=True, dense_path=1.0)),
    "ADMM with memory on a mesh": ((1, 2, 2), PruneConfig(recovery="admm", ema=0.5)),
}


class CutOffError(Exception):
    """What stops the event."""


@pytest.fixture(autouse=True)
def _every_block_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_resumable", functools.partial(events._resumable, save_seconds=-1.0))


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that have been pruned, in order."""
    found: list[int] = []
    prune_one = blockwise.prune_one

    def count(plan: Any, index: int, *rest: Any) -> Any:
        found.append(index)
        return prune_one(plan, index, *rest)

    monkeypatch.setattr(blockwise, "prune_one", count)
    return found


def cut_before(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    prune_one = blockwise.prune_one

    def cut(plan: Any, index: int, *rest: Any) -> Any:
        if index == block:
            raise CutOffError
        return prune_one(plan, index, *rest)

    monkeypatch.setattr(blockwise, "prune_one", cut)


def settings(prune: PruneConfig, shape: tuple[int, int, int]) -> Config:
    prune = dataclasses.replace(prune, calibration_rows=8, calibration_length=16, calibration_tokens=64)
    return Config(
        model=ModelConfig(compute_dtype="float32"),
        lora=LoraConfig(rank=2),
        prune=prune,
        train=TrainConfig(batch_size=4),
        mesh=MeshConfig(*shape),
    )


def comparable(state: RunState) -> Any:
    return dataclasses.replace(state, prune=dataclasses.replace(state.prune, key=jax.random.key_data(state.prune.key)))


@pytest.mark.parametrize("case", few_of(EVENTS, "ADMM with memory", "SparseGPT with layer budgets"))
def test_a_cut_off_event_goes_on_from_its_blocks(
    case: str, tmp_path: Path, pruned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two events, the second one, which remembers the first, cut off twice."""
    shape, prune = EVENTS[case]
    config = settings(prune, shape)
    with jax.set_mesh(make_mesh(config.mesh)):
        prepared, state = start(config, SPEC)
        run: Callable[..., RunState] = functools.partial(events.prune_run, config, prepared, attention_path="xla")
        before = run(state, Event(1, 0.25, False), tmp_path / "first")
        expected = run(before, Event(2, 0.5, True), tmp_path / "whole")
        pruned.clear()
        for block in (1, 3):
            with monkeypatch.context() as patch:
                cut_before(patch, block)
                with pytest.raises(CutOffError):
                    run(before, Event(2, 0.5, True), tmp_path / "event")
        # A process killed while it saves leaves this: Orbax renames only what is complete.
        (tmp_path / "event" / "blocks-00003-00004.orbax-checkpoint-tmp").mkdir()
        found = run(before, Event(2, 0.5, True), tmp_path / "event")
    assert pruned == [0, 1, 2, 3]
    chex.assert_trees_all_equal(comparable(found), comparable(expected))
    chex.assert_trees_all_equal_dtypes(comparable(found), comparable(expected))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    moved = [np.asarray(b) for b in jax.tree.leaves(jax.tree.map(jnp.subtract, found.params, before.params))]
    assert any(np.any(difference) for difference in moved) is moves_base(prune)


def test_no_block_outlives_its_place_among_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two saves nothing holds what the stacked arrays have: it would be another copy of the new base."""
    monkeypatch.setattr(events, "_resumable", functools.partial(events._resumable, save_seconds=1e9))
    prune_one, blocks, most = blockwise.prune_one, [], 0

    def watched(*arguments: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(block() is not None for block in blocks))
        layer, memory = prune_one(*arguments)
        blocks.append(weakref.ref(layer.weights["down_proj"]))
        return layer, memory

    monkeypatch.setattr(blockwise, "prune_one", watched)
    config = settings(PruneConfig(recovery="admm"), (1, 1, 1))
    prepared, state = start(config, SPEC)
    events.prune_run(config, prepared, state, Event(1, 0.5, True), tmp_path / "event", attention_path="xla")
    assert len(blocks) == LAYERS and most <= 1


def test_a_run_cut_off_in_its_event_goes_on_and_leaves_no_blocks(
    launch: Callable[..., Path],
    efx_run: Path,
    tmp_path: Path,
    pruned: list[int],
    monkeypatch: pytest.MonkeyPatch,
    metrics_of: Any,
    files_of: Any,
) -> None:
    """The checkpoint before the event holds no masks, the one that takes its place does."""
    saved = remember_saves(monkeypatch)
    with monkeypatch.context() as patch:
        cut_before(patch, 1)
        with pytest.raises(CutOffError):
            launch(tmp_path / "run", "--preset", "efx")
    assert saved == [(1, True, False)]
    assert [path.name for path in (tmp_path / "run" / "event").rglob("blocks-*")] == ["blocks-00000-00001"]
    launch(tmp_path / "run", "--preset", "efx")
    assert pruned == [0, 1]
    assert saved == [(1, True, False), (1, False, True), (6, False, True)]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in efx_run.iterdir()}
    assert [row["loss"] for row in metrics_of(tmp_path / "run")] == [row["loss"] for row in metrics_of(efx_run)]
    assert files_of(tmp_path / "run" / "export") == files_of(efx_run / "export")


def remember_saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """(step, waiting, masked) of every checkpoint that is saved from here on, but for one that is there already."""
    found: list[tuple[int, bool, bool]] = []
    save = checkpoint.save

    def remember(manager: Any, state: RunState, base_moved: bool, waiting: bool, *rest: Any) -> None:
        step = int(state.train.step)
        if not waiting or manager.latest_step() != step:
            found.append((step, waiting, bool(state.masks)))
        save(manager, state, base_moved, waiting, *rest)

    monkeypatch.setattr(checkpoint, "save", remember)
    return found
