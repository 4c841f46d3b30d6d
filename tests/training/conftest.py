"""Whole runs of train.py on five rows and a tiny model, each trained once for many tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import train
from tests.quick import quick_compilation, shared_steps
from tests.tiny import ROWS, TEST_ROWS, write_rows

SETTINGS = """
model:
  path: {model}
  compute_dtype: float32
data:
  train: {folder}/rows.jsonl
  test: {folder}/test.jsonl
  holdout: 0.2
  max_length: 32
lora:
  rank: 2
prune:
  calibration: train
  calibration_tokens: 128
distill:
  text: ""
train:
  steps: 6
  batch_size: 2
  learning_rate: 1e-2
  remat: none
eval:
  window: 32
"""
Launch = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="session")
def settings_file(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A user's own YAML file beside the user's own rows."""
    folder = tmp_path_factory.mktemp("user")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "test.jsonl", TEST_ROWS)
    (folder / "mine.yaml").write_text(SETTINGS.format(model=tiny_folder, folder=folder))
    return folder / "mine.yaml"


@pytest.fixture(scope="session")
def launch(settings_file: Path) -> Iterator[Launch]:
    """`launch(output, *flags, code=0)`: train.py on the user's file, which must end with that exit code."""

    def start(output: Path, *flags: str, code: int = 0) -> Path:
        # Once more here: runs of the session start before the fixture of any module.
        with quick_compilation():
            assert train.main(["--config", str(settings_file), "--output", str(output), *flags]) == code
        return output

    with shared_steps():
        yield start


@pytest.fixture(scope="session")
def paper_run(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "paper", "--preset", "paper")


@pytest.fixture(scope="session")
def official_run(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "official", "--preset", "official")


@pytest.fixture(scope="session")
def efx_run(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "efx", "--preset", "efx")


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """`metrics_of(run)`: the rows of metrics.jsonl."""
    return lambda run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """`files_of(folder)`: every file's bytes."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
