"""A run whose training diverges ends with one line before anything of it is saved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import efx_jax.training.loop as loop_module

Launch = Callable[..., Path]
ADVICE = "lower train.learning_rate or set model.compute_dtype float32, and choose another --output"


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("steps", [1, 3])
def test_an_update_that_goes_too_far_is_noticed_before_it_is_saved(
    steps: int, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The loss before the only update is finite, and so is every entry of the adapters after it, but not B A.
    flags = ("--train.steps", str(steps), "--train.learning_rate", "1e30", "--train.schedule", "constant")
    run = launch(tmp_path / "run", *flags, "--train.clip", "0", "--train.checkpoint_every", "1", code=2)
    assert capsys.readouterr().err.endswith(f"train.py: step 1: the norm of the adapters is not finite; {ADVICE}\n")
    assert checkpoints(run) == [] and not (run / "export").exists() and not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loss", "the loss"),
        ("grad_norm", "the norm of the gradient"),
        ("adapter_norm", "the norm of the adapters"),
    ],
)
def test_the_last_good_checkpoint_stays(
    name: str,
    said: str,
    launch: Launch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = loop_module.train_step

    def diverging(state: Any, *rest: Any) -> Any:
        number = int(state.step)
        new, metrics = step(state, *rest)
        return new, metrics | ({name: jnp.float32(math.nan)} if number == 2 else {})

    monkeypatch.setattr(loop_module, "train_step", diverging)
    flags = ("--prune.sparsity", "0", "--train.checkpoint_every", "1")
    run = launch(tmp_path / "run", *flags, code=2)
    assert capsys.readouterr().err.endswith(f"train.py: step 3: {said} is not finite; {ADVICE}\n")
    assert checkpoints(run) == [1, 2]
