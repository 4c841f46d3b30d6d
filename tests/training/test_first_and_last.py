"""Pruning before the first update or after the last one: what training sees, and what is left of it in the export."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from efx_jax.pruning import blockwise
from efx_jax.training import events
from tests.tiny import linears

pytestmark = pytest.mark.slow

STEPS = 6
WANDA = ("--preset", "paper", "--prune.recovery", "none", "--prune.score", "wanda", "--prune.schedule", "fractions")
POST_HOC = (*WANDA, "--prune.fractions", "1")
PRUNE_FIRST = (*WANDA, "--prune.fractions", "0")
SAVE_ALL = ("--train.checkpoint_every", "1", "--train.keep", "9")


class CutOffError(Exception):
    """What stops the event."""


@pytest.fixture(scope="module")
def dense(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "dense", *WANDA, "--prune.sparsity", "0")


@pytest.fixture(scope="module")
def post_hoc(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "post_hoc", *POST_HOC)


@pytest.fixture(scope="module")
def prune_first(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "prune_first", *PRUNE_FIRST, *SAVE_ALL)


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return ocp.StandardCheckpointer().restore(run / "checkpoints" / str(step) / "state")


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_pruned_after_the_last_update_is_the_dense_expert_without_some_entries(
    post_hoc: Path, dense: Path, metrics_of: Any
) -> None:
    """Nothing of the pruning reaches the updates, and no update follows it."""
    losses = [[row["loss"] for row in metrics_of(run)] for run in (post_hoc, dense)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert [event["step"] for event in summary(post_hoc)["events"]] == [STEPS]
    trained = linears(dense / "export")
    for name, weight in linears(post_hoc / "export").items():
        assert ((weight == 0).sum(axis=-1) == weight.shape[-1] // 2).all(), name
        np.testing.assert_array_equal(weight, np.where(weight == 0, 0, trained[name]))
    found = summary(post_hoc)["results"][f"dense LoRA, step {STEPS}"]["perplexity"]["value"]
    assert found == pytest.approx(summary(dense)["results"]["dense expert"]["perplexity"]["value"], rel=1e-5)


def test_pruned_before_the_first_update_has_one_mask_from_there_on(
    prune_first: Path, tiny_folder: Path, metrics_of: Any
) -> None:
    rows = metrics_of(prune_first)
    assert [row["sparsity"] for row in rows] == [0.5] * STEPS
    assert [event["step"] for event in summary(prune_first)["events"]] == [0]
    # An adapter that has learned nothing yet is not measured beside the base.
    assert set(summary(prune_first)["results"]) == {"base", "sparse expert"}
    masks = [checkpoint(prune_first, step)["masks"] for step in range(STEPS + 1)]
    base = linears(tiny_folder)
    for name, weight in linears(prune_first / "export").items():
        gone = weight == 0
        assert (gone.sum(axis=-1) == weight.shape[-1] // 2).all(), name
        for mask in masks:
            kept = np.unpackbits(np.asarray(mask[name]), axis=-1, count=weight.shape[-1], bitorder="little")
            np.testing.assert_array_equal(kept == 0, gone)
        # Training has moved what stays.
        assert np.abs(weight - base[name])[~gone].max() > 1e-4


def test_the_first_mask_is_that_of_the_base(prune_first: Path, launch: Any, tmp_path: Path) -> None:
    """One update at a learning rate of nothing, then the event: the same mask."""
    flags = ("--train.steps", "1", "--train.learning_rate", "1e-30")
    late = linears(launch(tmp_path / "late", *POST_HOC, *flags) / "export")
    for name, weight in linears(prune_first / "export").items():
        np.testing.assert_array_equal(weight == 0, late[name] == 0)


def test_cut_off_in_the_event_before_the_first_update_it_goes_on_there(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of: Any, metrics_of: Any
) -> None:
    """The base is not measured again, finished blocks are not pruned again, and the outcome is the same."""
    flags = ("--preset", "efx", "--prune.fractions", "0")
    pruned: list[int] = []
    prune_one = blockwise.prune_one

    def cut(plan: Any, index: int, *rest: Any) -> Any:
        pruned.append(index)
        if pruned == [0, 1]:
            raise CutOffError
        return prune_one(plan, index, *rest)

    monkeypatch.setattr(events, "_resumable", functools.partial(events._resumable, save_seconds=-1.0))
    monkeypatch.setattr(blockwise, "prune_one", cut)
    with pytest.raises(CutOffError):
        launch(tmp_path / "cut", *flags)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["0"]
    launch(tmp_path / "cut", *flags)
    assert pruned == [0, 1, 1]
    launch(tmp_path / "whole", *flags)
    assert files_of(tmp_path / "cut" / "export") == files_of(tmp_path / "whole" / "export")
    losses = [[row["loss"] for row in metrics_of(tmp_path / name)] for name in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
