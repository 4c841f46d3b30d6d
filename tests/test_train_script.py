"""train.py as a command: plans, helps, and answers every kind of bad input with one line and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from efx_jax.config import Config, DistillConfig, MeshConfig, TrainConfig
from efx_jax.config_io import to_yaml
from efx_jax.config_values import setting_types
from efx_jax.training.run import _warn_of_other_parts, refuse_other_run

ROOT = Path(__file__).parent.parent
Say = Callable[..., str]


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "fever cough", "response": "lung"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(5)))
    return path


@pytest.fixture
def flags(model: Path, rows: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "mine.yaml"
    own = "prune: {calibration: train}\ndistill: {text: ''}\n"
    config.write_text(f"preset: efx\nmodel: {{path: {model}}}\ndata: {{train: {rows}, max_length: 32}}\n{own}")
    return ["--config", str(config), "--eval.window", "32", "--output", str(tmp_path / "out")]


@pytest.fixture
def refusal(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """`refusal(*more flags)`: the one line that train.py says, having left nothing behind."""

    def say(*more: str) -> str:
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert train.main([*flags, *more]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and said.err.startswith("train.py: "), said.err
        assert sorted(tmp_path.iterdir()) == before
        return said.err

    return say


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(model: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_a_truncated_checkpoint_is_refused(model: Path, refusal: Say) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refusal()


def test_a_missing_shard_is_refused(model: Path, refusal: Say) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors: shard is missing" in refusal()


@pytest.mark.parametrize("file", [7, "../model-00002-of-00002.safetensors", "/model.safetensors"])
def test_a_shard_outside_the_folder_is_refused(model: Path, refusal: Say, file: Any) -> None:
    (model / "model.safetensors").rename(model.parent / "model-00002-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    assert "weight_map model.norm.weight: expected the name of a file in this folder" in refusal()


def test_a_wrong_shape_is_refused(model: Path, refusal: Say) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(model, lambda tensors: tensors.update({name: np.zeros((24, 17), np.float32)}))
    said = refusal()
    assert name in said and "[24, 17], expected [24, 16]" in said


def test_an_extra_tensor_is_refused(model: Path, refusal: Say) -> None:
    change_tensors(model, lambda tensors: tensors.update({"model.extra.weight": np.zeros(3, np.float32)}))
    assert "model.extra.weight" in refusal()


def test_a_weight_that_is_not_a_number_is_refused(model: Path, refusal: Say) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][3, 5] = np.nan

    change_tensors(model, spoil)
    assert f"{name} holds nan at [3, 5]" in refusal()


def test_an_unsupported_architecture_is_refused_by_name(model: Path, refusal: Say) -> None:
    change_config(model, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert "gpt2" in refusal()


def test_an_unsupported_rope_is_refused_by_name(model: Path, refusal: Say) -> None:
    change_config(model, rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0})
    assert "longrope" in refusal()


def test_a_missing_model_is_refused(refusal: Say, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal("--model.path", str(tmp_path / "nowhere"))


def test_a_broken_line_of_data_is_named(rows: Path, refusal: Say) -> None:
    rows.write_text(rows.read_text() + '{"prompt": "fever", "resp\n')
    assert f"{rows} line 6: not JSON" in refusal()


def test_a_row_without_a_response_is_named(rows: Path, refusal: Say) -> None:
    rows.write_text(rows.read_text() + '{"prompt": "fever", "response": " "}\n')
    assert f"{rows} row 6: the response is empty" in refusal()


def test_a_root_that_is_no_folder_is_named_in_a_dry_run_too(refusal: Say) -> None:
    for more in ([], ["--dry-run"]):
        assert "data.root: no folder /no/such/place" in refusal("--data.root", "/no/such/place", *more)


def test_an_empty_data_set_is_refused(rows: Path, refusal: Say) -> None:
    rows.write_text("")
    assert f"{rows}: no rows found" in refusal()


def test_a_prompt_without_room_for_a_response_is_named(rows: Path, refusal: Say) -> None:
    rows.write_text(rows.read_text() + json.dumps({"prompt": "cough " * 32, "response": "lung"}) + "\n")
    said = refusal()
    assert f"{rows} row 6: the prompt has 32 tokens" in said and "data.max_length 32" in said


def test_a_test_prompt_beyond_the_context_is_named(tmp_path: Path, refusal: Say) -> None:
    test = tmp_path / "test.jsonl"
    long = {"prompt": "cough " * 65, "response": "lung"}
    test.write_text(json.dumps({"prompt": "rash", "response": "skin"}) + "\n" + json.dumps(long) + "\n")
    said = refusal("--data.test", str(test))
    assert f"{test} row 2: the prompt has 65 tokens" in said


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--prune.sparsity", "1.0"], ["prune.sparsity", "[0, 1)", "1.0"]),
        (["--prune.group", "2:4", "--prune.sparsity", "0.4"], ["prune.sparsity", "2:4", "0.5", "0.4"]),
        (
            ["--prune.group", "5:10", "--prune.sparsity", "0.5", "--prune.budget", "uniform"],
            ["5:10", "divisible by 10", "16"],
        ),
        (["--prune.sparsty", "0.5"], ["--prune.sparsty", "the nearest is --prune.sparsity"]),
        (["--train.steps", "many"], ["--train.steps", "an integer", "many"]),
        (["--data.max_length", "65"], ["data.max_length", "context of 64 tokens", "found 65"]),
        (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["--prune.calibration", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--train.batch_size", "6", "--train.micro_batch", "4"], ["train.batch_size", "train.micro_batch 4"]),
    ],
)
def test_bad_settings_are_refused_by_name(more: list[str], parts: list[str], refusal: Say) -> None:
    said = refusal(*more)
    assert all(part in said for part in parts), said


def test_a_perplexity_window_beyond_the_context_is_refused(tmp_path: Path, refusal: Say) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "cough " * 65}) + "\n")
    said = refusal("--data.text", str(text), "--eval.window", "65")
    assert "eval.window" in said and "context of 64 tokens, found 65" in said


@pytest.mark.parametrize("setting", ["prune.calibration", "distill.text"])
def test_a_text_that_is_too_short_is_named(setting: str, tmp_path: Path, refusal: Say) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "cough"}) + "\n")
    said = refusal(f"--{setting}", str(text))
    assert f"{setting} {text}: expected at least 2 tokens, found 1; give more text" in said


def test_an_output_that_holds_something_else_is_refused(tmp_path: Path, refusal: Say) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "is not an empty folder and holds no run" in refusal()


def test_what_a_killed_run_left_half_written_is_no_other_thing(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.abcd.partial").touch()
    refuse_other_run(Config(), tmp_path)


def test_a_teacher_that_reads_other_rows_in_other_parts_is_said_to(tmp_path: Path) -> None:
    def begun(micro_tokens: int, row_share: float, fsdp: int) -> Config:
        teacher = DistillConfig(teacher="base", row_share=row_share)
        return Config(train=TrainConfig(micro_tokens=micro_tokens), distill=teacher, mesh=MeshConfig(data=2, fsdp=fsdp))

    (tmp_path / "config.yaml").write_text(to_yaml(begun(4096, 0.5, 1)))
    tokens = "micro_tokens 4096 on mesh.data x mesh.fsdp"
    with pytest.warns(UserWarning, match=f"{tokens} 2, found .*{tokens} 8: batches are cut otherwise"):
        _warn_of_other_parts(begun(4096, 0.5, 4), tmp_path)
    with pytest.warns(UserWarning, match=f"{tokens} 2, found train.micro_batch 16: batches are cut otherwise"):
        _warn_of_other_parts(begun(0, 0.5, 1), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alike in (begun(4096, 0.5, 1), begun(4096, 1.0, 4)):
            _warn_of_other_parts(alike, tmp_path)
        (tmp_path / "config.yaml").write_text(to_yaml(begun(0, 0.5, 1)))
        _warn_of_other_parts(begun(0, 0.5, 4), tmp_path)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, refusal: Say) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'}" in refusal("--output", str(tmp_path / "file"))
    assert f"{tmp_path / 'file'}" in refusal("--output", str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused(name: str, refusal: Say, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX", "wandb": "wandb"}[name], None)
    said = refusal(f"--log.{name}")
    assert f"log.{name}" in said and "pip install" in said


def test_a_dry_run_prints_the_plan_and_writes_nothing(flags: list[str], tmp_path: Path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*flags, "--dry-run", "--train.steps", "10"]) == 0
    plan = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    # Two blocks of q, o [16,16], k, v [8,16], gate, up [24,16] and down [16,24].
    assert f"{2 * (2 * 256 + 2 * 128 + 3 * 384):,} in linears" in plan
    assert "10 steps of 16 sequences" in plan and "step 1 to 50%" in plan


def test_help_names_every_setting_and_its_value() -> None:
    """As a user starts it, from another folder."""
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT.parent)
    assert (found.returncode, found.stderr) == (0, "")
    missing = [name for name in setting_types() if f"--{name}" not in found.stdout]
    assert missing == []
    assert all(name in found.stdout for name in ("--config", "--preset", "--output", "--dry_run", "SmolLM2"))


def test_the_core_trains_without_the_extra_packages() -> None:
    blocked = ("transformers", "tokenizers", "datasets", "evaluate", "tyro", "tqdm", "gguf", "sklearn", "torch")
    script = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport efx_jax.training.step\n"
    script += "import efx_jax.training.checkpoint, efx_jax.training.schedule, efx_jax.model.loss"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr
