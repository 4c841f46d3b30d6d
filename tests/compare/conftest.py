"""A small comparison on the tiny model, whose child processes are calls in this one."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import efx_jax.evaluation.__main__ as evaluation
from efx_jax.compare import __main__ as compare
from efx_jax.compare import train_one, work
from tests.quick import quick_compilation, shared_steps
from tests.tiny import write_rows

LINES = [("fever cough", "lung"), ("old rash mild", "skin"), ("no cough", "lung"), ("severe rash", "skin")]
TEST_LINES = [("mild cough", "lung"), ("severe rash old", "skin"), ("new rash", "skin")]
# Three windows of 16 tokens and a rest, no two alike, so that perplexity has an interval.
TEXT = (
    "old skin rash . yes no mild cough joint pain severe chronic heart lung . new blood fever no . old cough yes mild "
    "rash skin severe lung pain heart . chronic joint blood new . fever cough rash yes no old pain mild lung . severe"
)
BASE = """
base:
  model: {{path: {model}, compute_dtype: float32}}
  data: {{train: {folder}/train.jsonl, holdout: 0, max_length: 32}}
  lora: {{rank: 2}}
  prune: {{calibration_tokens: 128}}
  train: {{steps: 3, batch_size: 2, learning_rate: 1e-2, remat: none}}
methods:
  dense: {{prune: {{sparsity: 0}}}}
  wanda: {{prune: {{score: wanda}}}}
  magnitude: {{prune: {{score: magnitude, group: matrix}}}}
schedules:
  post_hoc: {{prune: {{schedule: fractions, fractions: [1]}}}}
  prune_first: {{prune: {{schedule: fractions, fractions: [0]}}}}
evaluate:
  tasks: [{folder}/test.jsonl]
  texts: {{general: {folder}/text.jsonl}}
  window: 16
reference: dense
"""
MODULES = {"efx_jax.compare.train_one": train_one.main, "efx_jax.evaluation": evaluation.main}
Write = Callable[..., Path]
Call = Callable[[str, Sequence[str], Path], int]


def call_here(module: str, arguments: Sequence[str], log: Path) -> int:
    """What `process.call` does, in this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        return MODULES[module](list(arguments))


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation(), shared_steps(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "call", call_here)
        yield


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Write:
    """`write(name, more)`: a comparison beside its data; `more` is YAML below the base, its keys replacing those."""
    folder = tmp_path_factory.mktemp("user")
    write_rows(folder / "train.jsonl", LINES)
    write_rows(folder / "test.jsonl", TEST_LINES)
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    base = BASE.format(model=tiny_folder, folder=folder)

    def write_file(name: str, more: str = "") -> Path:
        tree = yaml.load(base, Loader=yaml.BaseLoader) | (yaml.load(more, Loader=yaml.BaseLoader) or {})
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return folder / f"{name}.yaml"

    return write_file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that have been called from here on, in order."""
    found: list[str] = []

    def remember(module: str, arguments: Sequence[str], log: Path) -> int:
        found.append(module.rpartition(".")[2])
        return call_here(module, arguments, log)

    monkeypatch.setattr(work, "call", remember)
    return found


@pytest.fixture(scope="session")
def launch() -> Callable[..., int]:
    """`launch(file, output, *flags)`: the command's exit code."""
    return lambda file, output, *flags: compare.main(["--config", str(file), "--output", str(output), *flags])


@pytest.fixture(scope="session")
def read() -> Callable[[Path], Any]:
    """`read(file)`: JSON."""
    return lambda path: json.loads(path.read_text())
