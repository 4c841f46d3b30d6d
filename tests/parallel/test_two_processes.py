"""A whole run by two real processes of two devices each, on one disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2")


def start(settings: Path, output: Path, *flags: str) -> list[subprocess.Popen[str]]:
    """train.py as process 0 and 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "train.py", "--config", str(settings), "--output", str(output), *MESH, *flags]
    command += ["--mesh.coordinator", coordinator, "--mesh.processes", "2", "--mesh.process"]
    return [
        subprocess.Popen(
            [*command, str(number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int) -> list[str]:
    """What each said on standard error, once both have ended with that code."""
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], said
    return said


def await_steps(output: Path, count: int) -> None:
    metrics = output / "metrics.jsonl"
    end = time.monotonic() + 100
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < end, "no step was done"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def interrupted_and_finished(
    even_settings: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str], list[int]]:
    """A run that was finished after a signal to one of its processes; what they said, and the steps done before."""
    output = tmp_path_factory.mktemp("two") / "run"
    processes = start(even_settings, output)
    # Now the first event begins, which takes longer than the signal.
    await_steps(output, 2)
    # As schedulers do; jax.distributed hears it too.
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes, code=130)
    done = [json.loads(line)["step"] for line in (output / "metrics.jsonl").open()]
    assert not (output / "summary.json").exists()
    finish(start(even_settings, output), code=0)
    return output, said, done


def test_a_signal_to_one_process_saves_and_ends_both(
    interrupted_and_finished: tuple[Path, list[str], list[int]],
) -> None:
    _, said, done = interrupted_and_finished
    assert done in ([1, 2], [1, 2, 3])
    for lines in said:
        assert f"interrupted after {len(done)} of 4 steps; saved" in lines
    assert "finishing the step" in said[1] and "finishing the step" not in said[0]


def test_two_processes_end_as_one_does(
    interrupted_and_finished: tuple[Path, list[str], list[int]],
    single_run: Path,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    """Every line of the metrics stands there once, and the results are measured alike."""
    output = interrupted_and_finished[0]
    assert_same_run(output, single_run)
    found, expected = (json.loads((run / "summary.json").read_text()) for run in (output, single_run))
    for model, results in expected["results"].items():
        assert found["results"][model]["tasks"] == results["tasks"]
        assert found["results"][model]["perplexity"]["value"] == pytest.approx(results["perplexity"]["value"], rel=1e-5)
    assert found["sparsity"] == expected["sparsity"]
    assert {path.name for path in output.iterdir()} == {path.name for path in single_run.iterdir()}


def test_what_one_process_refuses_ends_both(even_settings: Path, tmp_path: Path) -> None:
    """Only the first looks into the folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    said = finish(start(even_settings, tmp_path / "mine"), code=2)
    assert "holds no run" in said[0].splitlines()[-1]
    assert "process 0 has failed" in said[1].splitlines()[-1]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
