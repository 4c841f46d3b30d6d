"""Whole runs of train.py on a tiny model that eight devices divide along any axis."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.weights.hf import load_pretrained, save_pretrained
from tests.quick import quick_compilation, shared_steps
from tests.tiny import EVEN, ROWS, TEST_ROWS, save_tokenizer, write_rows

# Two events, after steps 2 and 4.
SETTINGS = """
preset: paper
model:
  path: {folder}/model
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
  calibration_tokens: 256
train:
  steps: 4
  epochs: 2
  batch_size: 8
  learning_rate: 1e-2
  checkpoint_every: 1
distill:
  teacher: base
  prefix_share: 0.5
eval:
  window: 32
"""


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="session")
def even_settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file beside its rows and its model: D 32, F 64, eight query heads on four key/value heads, V 32."""
    folder = tmp_path_factory.mktemp("even")
    save_pretrained(folder / "model", init_params(jax.random.key(0), EVEN), EVEN)
    save_tokenizer(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS * 2)
    write_rows(folder / "test.jsonl", TEST_ROWS)
    (folder / "even.yaml").write_text(SETTINGS.format(folder=folder))
    return folder / "even.yaml"


@pytest.fixture(scope="session")
def run_on(even_settings: Path) -> Iterator[Callable[..., Path]]:
    """`run_on(mesh, output, *flags, code=0)`: train.py on data x fsdp x tensor devices, ending with that exit code."""

    def start(mesh: tuple[int, int, int], output: Path, *flags: str, code: int = 0) -> Path:
        shape = [text for pair in zip(("data", "fsdp", "tensor"), mesh, strict=True) for text in _flag(*pair)]
        assert train.main(["--config", str(even_settings), "--output", str(output), *shape, *flags]) == code
        return output

    with shared_steps():
        yield start


def _flag(axis: str, size: int) -> tuple[str, str]:
    return f"--mesh.{axis}", str(size)


@pytest.fixture(scope="session")
def single_run(run_on: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one device."""
    return run_on((1, 1, 1), tmp_path_factory.mktemp("runs") / "single")


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """`assert_same_run(found, expected)`: losses to 1e-5, masks but for 1e-4, weights to 1e-5 of the largest."""

    def check(found: Path, expected: Path) -> None:
        rows = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (found, expected)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
        for key in ("loss", "entropy", "tokens", "sparsity"):
            np.testing.assert_allclose(
                [row[key] for row in rows[0]], [row[key] for row in rows[1]], rtol=1e-5, err_msg=key
            )
        layers = [load_pretrained(run / "export")[0]["layers"] for run in (found, expected)]
        differing = 0
        for name in LINEARS:
            ours, theirs = (np.asarray(leaves[name]) for leaves in layers)
            same = (ours == 0) == (theirs == 0)
            differing += int((~same).sum())
            difference = np.abs(ours - theirs)[same].max()
            assert difference <= 1e-5 * np.abs(theirs).max(), (name, difference)
        assert differing <= 1e-4 * sum(layers[1][name].size for name in LINEARS)

    return check
