"""The command end to end on a tiny run, and one line with exit code 2 for every mistake."""

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from efx_jax.analysis.__main__ import main
from efx_jax.analysis.runs import choose_steps, load_base, open_run, run_adapters, training_rows
from efx_jax.config import Config
from efx_jax.config_io import to_yaml
from efx_jax.weights.hf import open_folder
from efx_jax.weights.merged import merged_source
from efx_jax.weights.params import params_source

SMALL = ["--rows", "3", "--length", "16", "--layers", "0", "--entries", "8"]


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Four steps of LoRA without pruning, a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("analysed")
    rows = [("fever cough", "lung"), ("old rash mild", "skin"), ("joint pain", "joint"), ("heart pain", "heart")]
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in rows * 2]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "model.path": tiny_folder,
        "model.compute_dtype": "float32",
        "data.train": folder / "rows.jsonl",
        "data.holdout": 0,
        "data.max_length": 32,
        "lora.rank": 2,
        "prune.sparsity": 0,
        "train.steps": 4,
        "train.batch_size": 2,
        "train.learning_rate": 1e-2,
        "train.remat": "none",
        "train.checkpoint_every": 2,
        "train.keep": 9,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert train.main(["--preset", "efx", "--output", str(folder / "dense"), *flags]) == 0
    return folder / "dense"


def pruned_checkpoint(folder: Path, step: int) -> None:
    """As much of a checkpoint under masks as is read of one."""
    place = folder / "checkpoints" / str(step)
    (place / "state").mkdir(parents=True)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = {"masked": True, "base_moved": False}
        checkpointer.save((place / "meta").absolute(), args=ocp.args.JsonSave(meta))


@pytest.mark.slow
def test_the_command_writes_tables_numbers_and_figures(dense_run, tmp_path, capsys) -> None:
    assert main([str(dense_run), *SMALL, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "dense"
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("score_error", "mask_overlap")}
    for analysis in found.values():
        assert [step["step"] for step in analysis["steps"]] == [0, 2, 4]
        assert analysis["asked"]["layers"] == [0, 1]
    last = found["score_error"]["steps"][-1]
    assert len(last["matrices"]) == 2 * 7 * 4
    assert all(np.isfinite(each["nll"]) and each["predicted"] > 0 for each in last["matrices"])
    assert f"| q_proj | wanda | 0 | {found['score_error']['steps'][0]['summary'][0]['ratio']:.3g} |" in printed
    assert "| matrix | foresight, foresight_gated | 4 |" in printed
    figures = {path.stem for path in folder.glob("*.png")}
    assert figures == {path.stem for path in folder.glob("*.csv")}
    assert {"score_error_foresight", "score_error_wanda_layers", "score_rank_4", "mask_overlap_row"} <= figures
    with (folder / "score_error_wanda.csv").open() as file:
        numbers = {(row["label"], row["x"]): float(row["y"]) for row in csv.DictReader(file)}
    assert numbers["q_proj", "0"] == pytest.approx(found["score_error"]["steps"][0]["summary"][0]["ratio"])


@pytest.mark.slow
def test_the_adapters_of_the_last_checkpoint_are_those_of_the_export(dense_run) -> None:
    run = open_run(dense_run)
    assert choose_steps(run, ()) == (0, 2, 4)
    base, spec = load_base(run)
    assert run_adapters(run, 0) is None
    early, late = (run_adapters(run, step) for step in (2, 4))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), early.lora_b, late.lora_b)))
    # (`merge` sums in float32, an export in float64.)
    exported = open_folder(dense_run / "export")
    merged = merged_source(params_source(base, spec, dense_run), spec, late, None)
    for name in exported.shapes:
        np.testing.assert_array_equal(merged.read(name), exported.read(name))
    batch = training_rows(run, spec, 3, 16)
    assert batch["tokens"].shape[0] == 3 and (batch["lengths"] > 0).all()


@pytest.mark.slow
def test_a_step_without_checkpoint_and_a_damaged_one_are_one_line(dense_run, tmp_path, capsys) -> None:
    assert main([str(dense_run), "--steps", "3", "--output", str(tmp_path / "out")]) == 2
    assert "no dense checkpoint of step 3; expected among 0, 2, 4" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(dense_run, broken)
    for file in (broken / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            file.unlink()
    assert main([str(broken), *SMALL, "--steps", "4", "--output", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error:") and "cannot be read as a checkpoint" in last


def test_what_is_no_dense_run_is_refused_in_one_line(tmp_path, capsys) -> None:
    def refused(folder: Path) -> str:
        assert main([str(folder), "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "is not a run; expected a folder that train.py has written" in refused(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(Config()))
    assert "holds no checkpoint" in refused(run)
    pruned_checkpoint(run, 5)
    assert "every checkpoint (5) is pruned" in refused(run)
    (run / "config.yaml").write_text("prune:\n  sparsitty: 0.5\n")
    assert "sparsitty" in refused(run)
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_are_refused(tmp_path, capsys) -> None:
    folders = []
    for parent in ("a", "b"):
        folder = tmp_path / parent / "run"
        (folder / "checkpoints" / "1" / "state").mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(Config()))
        folders.append(str(folder))
    assert main([*folders, "--output", str(tmp_path / "out")]) == 2
    assert "run: expected runs of different names" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--sparsity", "1"], ["--group", "rows"], ["--group", "2:4", "--sparsity", "0.4"]])
def test_a_mask_that_cannot_be_is_refused_before_any_work(flags, tmp_path, capsys) -> None:
    assert main([str(tmp_path / "nothing"), "--output", str(tmp_path), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is not a run" not in said


@pytest.mark.parametrize("flags", [["--what", "score_errors"], ["--layers", "-1"], ["--rows", "0"]])
def test_a_wrong_flag_is_one_line(flags, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and flags[0] in said
