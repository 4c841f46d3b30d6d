"""The command as a user runs it, with its child processes: Ctrl-C in the middle of a training, and on again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 60
Begin = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def command(write: Callable[..., Path], tiny_folder: Path, tmp_path: Path) -> Iterator[Begin]:
    """`command()`: the command on a comparison of one run, begun."""
    tree = f"""
    base:
      model: {{path: {tiny_folder}, compute_dtype: float32}}
      data: {{train: {write("any").parent}/train.jsonl, holdout: 0, max_length: 32}}
      prune: {{calibration_tokens: 128}}
      train: {{steps: {STEPS}, batch_size: 2, remat: none}}
    runs: {{dense: []}}
    evaluate: {{texts: {{general: {write("any").parent}/text.jsonl}}, window: 16}}
    """
    file = write("whole", tree)
    begun: list[subprocess.Popen[bytes]] = []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def begin() -> subprocess.Popen[bytes]:
        flags = ["--config", str(file), "--output", str(tmp_path / "out")]
        with (tmp_path / "said.txt").open("a") as said:
            arguments = [sys.executable, "-m", "efx_jax.compare", *flags]
            begun.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=said, stderr=said))
        return begun[-1]

    yield begin
    for process in begun:
        # With its child, if the test has failed.
        process.terminate()
        process.wait()


def test_it_goes_on_after_ctrl_c_in_a_training(command: Begin, tmp_path: Path, read: Callable[[Path], Any]) -> None:
    def lines() -> list[str]:
        found = list((tmp_path / "out" / "runs").glob("*-dense-*/metrics.jsonl"))
        return found[0].read_text().splitlines() if found else []

    running = command()
    end = time.monotonic() + 600
    while len(lines()) < 3:
        assert running.poll() is None and time.monotonic() < end, (tmp_path / "said.txt").read_text()
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=300) == 130
    cut = lines()
    assert 3 <= len(cut) < STEPS
    assert "the same command goes on from there" in (tmp_path / "said.txt").read_text()
    assert command().wait(timeout=600) == 0, (tmp_path / "said.txt").read_text()
    assert lines()[: len(cut)] == cut
    assert [json.loads(line)["step"] for line in lines()] == list(range(1, STEPS + 1))
    (entry,) = read(tmp_path / "out" / "whole" / "runs.json")
    assert (entry["method"], entry["status"]) == ("dense", "done")
    assert {"perplexity.general", "train_seconds"} <= set(entry["metrics"])
