"""How commands end: with one line for what the user can mend, and with everything for what is our own fault."""

import argparse
import errno
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import pytest

import train
from efx_jax.compare import train_one
from efx_jax.config import Config
from efx_jax.config_io import to_yaml
from efx_jax.errors import FallbackWarning, InputError, byte_size, exit_code

Finish = Callable[[BaseException], int]


def ends_with(error: BaseException) -> Callable[..., NoReturn]:
    def work(*_: object, **__: object) -> NoReturn:
        raise error

    return work


@pytest.fixture(params=["train.py", "error"])
def finish(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finish:
    """`finish(error)`: the exit code of a training that meets it, by train.py or in a comparison."""

    def start(error: BaseException) -> int:
        if request.param == "train.py":
            monkeypatch.setattr("efx_jax.training.run.run", ends_with(error))
            return train.main([])
        monkeypatch.setattr(train_one, "run", ends_with(error))
        (tmp_path / "run.yaml").write_text(to_yaml(Config()))
        return train_one.main([str(tmp_path / "run.yaml"), str(tmp_path / "run")])

    return start


def test_a_training_on_a_full_disk_says_so_in_one_line(finish: Finish, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/metrics.jsonl")) == 2
    said = capsys.readouterr().err
    assert said.endswith(": out/metrics.jsonl: the disk is full; make room, then run it again\n")
    assert said.count("\n") == 1


def test_a_training_without_memory_says_what_would_take_less(
    finish: Finish, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nBufferAssignment: ..."
    assert finish(jax.errors.JaxRuntimeError(text)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "allocate 123 bytes.); take smaller parts (train.micro_batch" in said
    with pytest.raises(RuntimeError, match="INTERNAL"):
        finish(jax.errors.JaxRuntimeError("INTERNAL: no kernel"))


def test_a_checkpoint_on_a_full_disk_is_told_as_any_other_file(
    finish: Finish, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ValueError(f"RESOURCE_EXHAUSTED: file 5: {os.strerror(errno.ENOSPC)} [os_error_code='28']")
    assert finish(full) == 2
    assert capsys.readouterr().err.endswith(": the output: the disk is full; make room, then run it again\n")
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED: out of registers"):
        finish(ValueError("RESOURCE_EXHAUSTED: out of registers"))


def test_a_training_that_is_interrupted_ends_as_shells_expect(finish: Finish) -> None:
    assert finish(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_reached_is_one_line(
    finish: Finish, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    assert finish(OSError(number, os.strerror(number), "locked/" + 5000 * "x")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 400
    assert f"xxx: {os.strerror(number)}; check the path and its permissions" in said


def test_another_error_of_the_system_is_told_in_full(finish: Finish) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        finish(OSError(errno.EIO, os.strerror(errno.EIO), "out/metrics.jsonl"))


def test_bad_input_is_one_line_by_whoever_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(ends_with(InputError("rows.jsonl:\n  no rows")), "error") == 2
    assert capsys.readouterr().err == "error: rows.jsonl: no rows\n"


def test_work_that_comes_to_its_end_says_how_itself() -> None:
    assert [exit_code(lambda code=code: code, "error") for code in (0, 130)] == [0, 130]


def test_a_warning_of_ours_is_one_line_without_its_place_in_the_source() -> None:
    shown = []

    def work() -> int:
        for file in ("site/efx_jax/data/sources.py", "site/other/module.py"):
            shown.append(warnings.formatwarning("2 rows are left out", UserWarning, file, 3))
        return 0

    before = warnings.formatwarning
    assert exit_code(work, "error") == 0
    assert shown[0] == "warning: 2 rows are left out\n" and "module.py:3" in shown[1]
    assert warnings.formatwarning is before


def test_a_comparison_does_not_calibrate_on_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> NoReturn:
        warnings.warn("2 rows are left out", stacklevel=2)
        warnings.warn("calibration on the training rows instead of C4", FallbackWarning, stacklevel=2)
        raise AssertionError("it went on")

    monkeypatch.setattr(train_one, "run", run)
    (tmp_path / "run.yaml").write_text(to_yaml(Config()))
    with pytest.warns(UserWarning, match="2 rows"):
        assert train_one.main([str(tmp_path / "run.yaml"), str(tmp_path / "run")]) == 2
    assert "nothing else than its file says: calibration on the training rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500 * 10**6), ("2GB", 2 * 10**9), ("1.5 gb", 15 * 10**8), ("2GiB", 2 << 30), ("10kB", 10**4), ("7", 7)],
)
def test_size_is_read_in_the_usual_units(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "0", "5 G B", "GB", "0.1B", "9" * 400])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as"):
        byte_size(text)
