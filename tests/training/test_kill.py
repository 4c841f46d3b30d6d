"""A run that is killed as the system kills (SIGKILL), wherever it stands, and started again ends in the same bytes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Run = Callable[..., None]
Reached = Callable[[Path], bool]


def lines(count: int) -> Reached:
    """Step `count` has its line in metrics.jsonl."""

    def reached(output: Path) -> bool:
        path = output / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    return reached


def saved(step: int) -> Reached:
    """The checkpoint of a step is whole: Orbax renames what is complete."""
    return lambda output: (output / "checkpoints" / str(step)).exists()


def saving(step: int) -> Reached:
    """The checkpoint of a step is being written, or just whole."""
    return lambda output: bool(list((output / "checkpoints").glob(f"{step}*")))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where these processes find what others have compiled: not where all tests do, as a kill may tear a file."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def process(settings_file: Path, programs: Path, tmp_path: Path) -> Run:
    """`process(*flags, kill_at=None)`: train.py in a process of its own, killed as soon as that is reached."""

    def start(*flags: str, kill_at: Reached | None = None) -> None:
        output = tmp_path / "run"
        command = [sys.executable, "train.py", "--config", str(settings_file), "--output", str(output), *flags]
        # As the uninterrupted run of this process compiles.
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(programs),
        }
        with (tmp_path / "said.txt").open("w") as said:
            running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
            try:
                end = time.monotonic() + 120
                while kill_at is not None and not kill_at(output):
                    assert running.poll() is None, (tmp_path / "said.txt").read_text()
                    assert time.monotonic() < end, "never got there"
                    time.sleep(0.002)
                if kill_at is not None:
                    running.kill()
                code = running.wait(timeout=120)
            finally:
                running.kill()
        expected = 0 if kill_at is None else -signal.SIGKILL
        assert code == expected, (tmp_path / "said.txt").read_text()

    return start


def assert_same_run(found: Path, expected: Path, metrics_of: Any, files_of: Any) -> None:
    """Same lines but for the speed, and an export of the same bytes; nothing half written is left."""
    rows = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics_of(r)] for r in (found, expected)
    ]
    assert rows[0] == rows[1]
    assert files_of(found / "export") == files_of(expected / "export")
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}


def test_killed_in_an_event_that_moves_the_base(
    process: Run, efx_run: Path, tmp_path: Path, metrics_of: Any, files_of: Any
) -> None:
    """The checkpoint before the event is whole, and the event is at work: ADMM's Grams compile for seconds."""
    process("--preset", "efx", kill_at=saved(1))
    assert len(metrics_of(tmp_path / "run")) == 1
    process("--preset", "efx")
    assert_same_run(tmp_path / "run", efx_run, metrics_of, files_of)


@pytest.mark.exhaustive
def test_killed_twice_while_checkpoints_are_written(
    process: Run, paper_run: Path, tmp_path: Path, metrics_of: Any, files_of: Any
) -> None:
    """A save of every step is under way in the background: in step 3 after an event, and in step 5."""
    flags = ("--preset", "paper", "--train.checkpoint_every", "1")
    process(*flags, kill_at=saving(3))
    process(*flags, kill_at=lines(5))
    process(*flags)
    assert_same_run(tmp_path / "run", paper_run, metrics_of, files_of)
