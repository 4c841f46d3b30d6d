"""Whole runs on meshes of simulated devices against one device, and from one mesh to another."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import efx_jax.training.loop as loop_module
from efx_jax.training import log

pytestmark = pytest.mark.slow


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Presses Ctrl-C as soon as the line of a step is in metrics.jsonl."""
    append = log.append_row

    def wrapped(path: Path, row: log.Row) -> None:
        append(path, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(log, "append_row", wrapped)


@pytest.mark.parametrize("mesh", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.exhaustive)])
def test_a_run_on_a_mesh_ends_as_on_one_device(
    mesh: tuple[int, int, int],
    run_on: Callable[..., Path],
    single_run: Path,
    tmp_path: Path,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    assert_same_run(run_on(mesh, tmp_path / "run"), single_run)


def test_the_default_preset_on_a_mesh_ends_as_on_one_device(
    run_on: Callable[..., Path], tmp_path: Path, assert_same_run: Callable[[Path, Path], None]
) -> None:
    flags = ("--preset", "efx", "--prune.fractions", "0.5", "--prune.calibration", "train", "--distill.text", "")
    # The preset's damping leaves the Gram of so few rows nearly singular, and roundings are magnified threefold.
    flags += ("--prune.admm_damping", "1")
    assert_same_run(
        run_on((2, 2, 2), tmp_path / "run", *flags),
        run_on((1, 1, 1), tmp_path / "single", *flags),
    )


def test_a_run_goes_on_on_another_mesh(
    run_on: Callable[..., Path],
    single_run: Path,
    tmp_path: Path,
    assert_same_run: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Interrupted between its two events: adapters, moments, masks and the memory of the average change places."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        run_on((2, 2, 2), tmp_path / "run", code=130)
    assert "interrupted after 3 of 4 steps; saved" in capsys.readouterr().err
    assert_same_run(run_on((1, 4, 1), tmp_path / "run"), single_run)


@pytest.mark.exhaustive
def test_a_moved_base_and_its_average_go_on_on_another_mesh(
    run_on: Callable[..., Path], tmp_path: Path, assert_same_run: Callable[[Path, Path], None]
) -> None:
    """Events that merge the adapters keep the average itself, in the hosts' memory."""
    flags = ("--prune.merge_each_event", "--train.steps", "2")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        run_on((1, 2, 4), tmp_path / "run", *flags, code=130)
    run_on((2, 2, 1), tmp_path / "run", *flags)
    assert_same_run(tmp_path / "run", run_on((1, 1, 1), tmp_path / "single", *flags))


def test_ctrl_c_on_another_host_saves_here_too(
    run_on: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr(loop_module, "asked", lambda stop: next(answers))
    run_on((1, 1, 1), tmp_path / "run", "--train.checkpoint_every", "0", code=130)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("mesh", "problem"),
    [
        ((1, 1, 8), "num_key_value_heads 4 does not divide into 8"),
        ((3, 1, 1), "8 does not divide into 3"),
        ((4, 4, 1), "needs 16 devices, found 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line_and_leaves_nothing(
    mesh: tuple[int, int, int],
    problem: str,
    run_on: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_on(mesh, tmp_path / "run", code=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("train.py: mesh: ") and problem in said, said
    assert list(tmp_path.iterdir()) == []
