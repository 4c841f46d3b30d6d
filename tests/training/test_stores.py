"""A run goes on with the calibration rows and the teacher that it began with."""

import dataclasses
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.data.tasks import Data, Task
from efx_jax.data.tokens import Tokenized
from efx_jax.training import loop, stores
from efx_jax.training.prepare import Prepared
from efx_jax.training.step import Teacher


@pytest.mark.parametrize("setting", ["prune.calibration", "data.text"])
def test_a_run_goes_on_only_with_the_rows_that_it_calibrated_and_was_measured_on(
    setting: str,
    launch: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever has become of them, as where C4 cannot be read any more."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    text = tmp_path / "text.txt"
    text.write_text("fever cough rash joint " * 40)
    run, flags = tmp_path / "run", ("--preset", "paper", f"--{setting}", str(text))
    with monkeypatch.context() as patch:
        patch.setattr("efx_jax.training.run._export", stop)
        launch(run, *flags, code=130)
    text.write_text("joint rash cough fever " * 40)
    capsys.readouterr()
    launch(run, *flags, code=2)
    said = capsys.readouterr().err
    assert "was written by a run that calibrates or is measured on other rows, or has another teacher" in said
    text.write_text("fever cough rash joint " * 40)
    launch(run, *flags)
    assert (run / "summary.json").exists()


def test_a_run_that_goes_on_holds_no_more_than_one_that_has_come_this_far(
    launch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state at step 0 would be the adapters and both of their moments once more."""
    held: list[int] = []

    def spied(used: Any, shown: Any, state: Any, batch: Any) -> Any:
        if int(state.train.step) == 3:
            gc.collect()
            held.append(sum(array.nbytes for array in jax.live_arrays()))
        return update(used, shown, state, batch)

    update = loop._update
    monkeypatch.setattr(loop, "_update", spied)
    run, flags = tmp_path / "run", ("--prune.sparsity", "0", "--train.steps", "4", "--train.checkpoint_every", "2")
    launch(run, *flags)
    for name in ("checkpoints/4", "export"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    launch(run, *flags)
    straight, resumed = held
    assert resumed <= straight


def test_a_fingerprint_of_sources_sees_calibration_rows_and_another_teacher() -> None:
    rows = [Tokenized(np.arange(5, dtype=np.int32), np.arange(5) > 2)]
    params = {"norm": jnp.ones(3)}
    plain: Any = Prepared(params, None, None, Data([], (), [], {}), [], [], (rows,))  # type: ignore[arg-type]
    same = dataclasses.replace(plain, teacher=Teacher(params, None))  # type: ignore[arg-type]
    others = [
        dataclasses.replace(plain, pools=(rows, rows)),
        dataclasses.replace(plain, windows=rows),
        dataclasses.replace(
            plain, data=dataclasses.replace(plain.data, tasks=(Task("mine", [Example("p", "yes")], ("yes",)),))
        ),
        dataclasses.replace(plain, teacher=Teacher({"norm": jnp.ones(3)}, None)),  # type: ignore[arg-type]
        dataclasses.replace(plain, teacher=Teacher({"norm": jnp.zeros(3)}, None)),  # type: ignore[arg-type]
    ]
    found = [stores._sources(each, stores._measured(each)) for each in (plain, same, *others)]
    assert found[0] == found[1] and len(set(found)) == 6
