"""A window of steps is traced, however the run comes in and out of it, and the trace speaks the paper's words."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from efx_jax.config import ProfileConfig
from efx_jax.training import log
from efx_jax.training.trace import tracing

pytestmark = pytest.mark.slow

SCOPES = ("attention", "mlp", "foresight", "select", "recover/partial_brain_surgeon")


def traces(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.xplane.pb"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the profiler is asked to do; the real one does not start."""
    found: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


@pytest.mark.parametrize(
    ("start", "steps", "first", "last", "expected"),
    [
        (2, 2, 0, 6, "0 1 start 2 3 stop 4 5"),
        (2, 9, 0, 4, "0 1 start 2 3 stop"),
        (2, 3, 3, 6, "start 3 4 stop 5"),  # taken up inside the window
        (2, 2, 4, 6, "4 5"),  # taken up behind it
        (2, 2, 0, 2, "0 1"),  # ends right before it
        (0, 0, 0, 2, "0 1"),
        (0, 1, 0, 1, "start 0 stop"),
    ],
)
def test_the_window_is_opened_and_closed_once(
    start: int, steps: int, first: int, last: int, expected: str, calls: list[str], tmp_path: Path
) -> None:
    with tracing(ProfileConfig(start, steps), tmp_path) as before_step:
        for number in range(first, last):
            before_step(number)
            calls.append(str(number))
    assert " ".join(calls) == expected


def work(profile: ProfileConfig, folder: Path) -> None:
    with tracing(profile, folder) as before_step:
        before_step(0)
        jax.block_until_ready(jnp.arange(3) + 1)
        raise MemoryError


def test_a_run_that_fails_inside_the_window_leaves_its_trace(tmp_path: Path) -> None:
    for attempt in ("first", "second"):
        with pytest.raises(MemoryError):
            work(ProfileConfig(0, 5), tmp_path / attempt)
        assert len(traces(tmp_path / attempt)) == 1


@pytest.mark.exhaustive
def test_a_run_resumed_inside_the_window_traces_step_and_event_by_name(
    launch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after step 3; the second session traces step 4 and the event behind it."""
    flags = ("--preset", "paper", "--profile.start", "2", "--profile.steps", "2")
    append = log.append_row

    def interrupt(path: Path, row: log.Row) -> None:
        append(path, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(log, "append_row", interrupt)
        run = launch(tmp_path / "run", *flags, code=130)
    (interrupted,) = traces(run / "profile")
    jax.clear_caches()  # a trace describes the programs that are compiled in it
    launch(run, *flags)
    found = [path for path in traces(run / "profile") if path != interrupted]
    assert len(found) == 1
    text = found[0].read_bytes()
    assert [scope for scope in SCOPES if f"/{scope}/".encode() not in text] == []
