"""metrics.jsonl is whole lines of valid JSON; TensorBoard and W&B get the same rows, where they are installed."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from efx_jax.config import Config, LogConfig
from efx_jax.errors import InputError
from efx_jax.training import log

ROW = {"step": 3, "loss": 2.5, "tokens_per_second": 10.0}


def test_a_row_is_a_line_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log.append_row(path, ROW)
    log.append_row(path, {"step": 4, "loss": float("nan"), "grad_norm": float("-inf")})
    first, second = path.read_text().splitlines()
    assert json.loads(first) == ROW
    assert json.loads(second) == {"step": 4, "loss": None, "grad_norm": None}


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_a_resumed_run_cuts_what_it_will_write_again(tmp_path: Path, step: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3):
        log.append_row(path, {"step": number})
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    log.cut_metrics(path, step)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept
    log.append_row(path, {"step": step + 1})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": step + 1}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_metrics_there_is_nothing_to_cut(tmp_path: Path) -> None:
    log.cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_by_default_nothing_else_is_written(tmp_path: Path) -> None:
    log.check_sinks(Config())
    with log.open_sinks(Config(), tmp_path) as sinks:
        assert sinks == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("setting", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line(setting: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        log.check_sinks(Config(log=LogConfig(**{setting: True})))
    message = str(caught.value)
    assert "\n" not in message and f"log.{setting}" in message and f"efx_jax[{setting}]" in message


def test_tensorboard_gets_every_value_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    fake = types.ModuleType("tensorboardX")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    config = Config(log=LogConfig(tensorboard=True))
    log.check_sinks(config)
    with log.open_sinks(config, tmp_path) as (sink,):
        sink(ROW)
        sink({"step": 4})
    values = [("step", 3, 3), ("loss", 2.5, 3), ("tokens_per_second", 10.0, 3), ("step", 4, 4)]
    assert written == [(str(tmp_path / "tensorboard"), 3), *values, "closed"]


def test_wandb_gets_the_settings_and_the_row_and_a_resumed_run_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, Any] = {}
    logged: list[Any] = []

    def init(**arguments: Any) -> types.SimpleNamespace:
        started.update(arguments)
        return types.SimpleNamespace(
            id="a1b2", log=lambda row, step: logged.append((row, step)), finish=lambda: logged.append("finished")
        )

    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(log=LogConfig(wandb=True))
    log.check_sinks(config)
    with log.open_sinks(config, tmp_path) as (sink,):
        sink(ROW)
    assert logged == [(ROW, 3), "finished"]
    assert (started["project"], started["name"]) == ("efx_jax", tmp_path.name) and started["dir"] == str(tmp_path)
    assert started["config"]["prune"]["sparsity"] == 0.5
    assert (started["id"], started["resume"]) == (None, None)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with log.open_sinks(config, tmp_path):
        assert (started["id"], started["resume"]) == ("a1b2", "allow")
        assert (started["project"], started["name"]) == ("mine", tmp_path.name)
