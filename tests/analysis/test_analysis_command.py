"""The command end to end on a tiny run, and one line with exit code 2 for every mistake."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import train
from efx_jax.analysis.__main__ import main
from efx_jax.analysis.held import before_event, choose_steps, read_checkpoint, run_adapters, run_linears, run_masks
from efx_jax.analysis.runs import load_base, load_export, open_run, training_rows
from efx_jax.config import Config, ModelConfig, PruneConfig
from efx_jax.config_io import to_yaml
from efx_jax.masks import unpack_mask
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
    return train_tiny(folder, tiny_folder, "dense", {"prune.sparsity": 0})


@pytest.fixture(scope="module")
def pruned_run(dense_run: Path, tiny_folder: Path) -> Path:
    """The same rows under another seed, with two events, each of which refits the base and is trained after."""
    pruning = {
        "prune.score": "wanda",
        "prune.group": "matrix",
        "prune.budget": "uniform",
        "prune.sparsity": 0.5,
        "prune.schedule": "fractions",
        "prune.fractions": "0 0.5",
        "prune.calibration_rows": 4,
        "seed": 1,
    }
    return train_tiny(dense_run.parent, tiny_folder, "pruned", pruning)


def train_tiny(folder: Path, tiny_folder: Path, name: str, changes: dict[str, object]) -> Path:
    """A run of four steps on FOLDER/rows.jsonl."""
    settings = {
        "model.path": tiny_folder,
        "model.compute_dtype": "float32",
        "data.train": folder / "rows.jsonl",
        "data.holdout": 0,
        "data.max_length": 32,
        "lora.rank": 2,
        "train.steps": 4,
        "train.batch_size": 2,
        "train.learning_rate": 1e-2,
        "train.remat": "none",
        "train.checkpoint_every": 2,
        "train.keep": 9,
        "prune.calibration": "train",
        "distill.text": "",
    } | changes
    flags = [text for key, value in settings.items() for text in (f"--{key}", *str(value).split(" "))]
    assert train.main(["--preset", "efx", "--output", str(folder / name), *flags]) == 0
    return folder / name


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
    for name, analysis in found.items():
        assert (folder / f"{name}.md").read_text() in printed
        with (folder / f"{name}_records.csv").open() as file:
            records = list(csv.DictReader(file))
        asked = [(step["step"], each) for step in analysis["steps"] for each in step["matrices"]]
        assert [(int(row["step"]), row["matrix"]) for row in records] == [
            (step, each["matrix"]) for step, each in asked
        ]
    figures = {path.stem for path in folder.glob("*.png")}
    assert figures == {path.stem for path in folder.glob("*.csv")} - {f"{name}_records" for name in found}
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


@pytest.mark.exhaustive
@pytest.mark.slow
def test_all_that_two_runs_allow_is_written_and_the_rest_left_out_in_one_line_each(
    dense_run, pruned_run, tmp_path, capsys
) -> None:
    studies = ["subspaces", "curves", "adapter_base", "sparsity", "mask_events", "scores", "recovery", "moved"]
    command = [str(dense_run), str(pruned_run), "--what", *studies, "mask_runs", "--domains", "one", "other"]
    output, summary = tmp_path / "out", tmp_path / "analysis.json"
    flags = ["--rows", "2", "--length", "16", "--output", str(output), "--summary", str(summary)]
    assert main([*command, *flags]) == 2
    said = capsys.readouterr()
    reasons = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(reasons) == 4
    assert sum("dense: its checkpoint holds no masks" in reason for reason in reasons) == 1
    assert sum("two prune events or more, found those of 0" in reason for reason in reasons) == 1
    assert sum("a dense run has no prune event" in reason for reason in reasons) == 2
    written = json.loads(summary.read_text())
    assert set(written["between"]) == {"subspaces", "curves"}
    assert set(written["runs"]["dense"]) == {"adapter_base", "sparsity", "moved"}
    assert set(written["runs"]["pruned"]) == set(studies) - {"subspaces", "curves"}
    assert "| dense | pruned | other domain, other seed | q_proj |" in said.out
    for folder in (output, output / "dense", output / "pruned"):
        assert {path.stem for path in folder.glob("*.png")} <= {path.stem for path in folder.glob("*.csv")}
    zeros = json.loads((output / "pruned" / "sparsity.json").read_text())
    assert all(each["sparsity"] == pytest.approx(0.5, abs=0.01) for each in zeros["records"])
    assert written["runs"]["dense"]["sparsity"]["summary"][-1]["sparsity"] == 0
    events = written["runs"]["pruned"]["mask_events"]
    assert events["asked"]["steps"] == [0, 2]
    assert 0.5 < events["summary"][-1]["kept"] <= 1
    moved = written["runs"]["pruned"]["moved"]["summary"][-1]
    assert moved["event_norm"] > moved["training_norm"] > 0
    (curve, other) = (row["loss_last"] for row in written["between"]["curves"]["summary"])
    assert np.isfinite(curve) and np.isfinite(other)


@pytest.mark.parametrize(("dtype", "loaded"), [("keep", "float32"), ("bfloat16", "bfloat16")])
def test_the_base_is_that_of_training(dtype: Any, loaded: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = Config(model=ModelConfig(path=str(tiny_folder), dtype=dtype))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    params, _ = load_base(open_run(tmp_path))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {loaded}


@pytest.mark.slow
def test_masks_of_a_run_are_those_of_its_export(pruned_run) -> None:
    run = open_run(pruned_run)
    checkpoint = read_checkpoint(run, run.steps[-1])
    assert (checkpoint.events, checkpoint.masked, checkpoint.base_moved) == (2, True, True)
    masks, exported, moved = run_masks(run, checkpoint), load_export(run), run_linears(run, checkpoint)
    for name, mask in masks.items():
        kept = np.asarray(unpack_mask(jax.numpy.asarray(mask), exported[name].shape[-1]))
        np.testing.assert_array_equal(np.asarray(exported[name]) != 0, kept)
        assert not np.any(moved[name][~kept])
    params, spec = load_base(run)
    step, adapters = before_event(run, params, spec)
    assert step == 0 and not any(np.any(b) for b in adapters.lora_b.values())
    trained = run_adapters(run, run.steps[-1])
    for name, first in adapters.lora_a.items():
        np.testing.assert_allclose(first, trained.lora_a[name], atol=0.1)  # four steps of 0.01 at most


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
    (run / "config.yaml").write_text(to_yaml(Config(prune=PruneConfig(score="atp"))))
    assert "cuts out whole units" in refused(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["moved", "scores", "recovery", "adapter_base", "mask_runs", "subspaces"])
def test_lines_in_another_order_are_compared_with_nothing(what: str, tmp_path, capsys) -> None:
    prune = PruneConfig(group="2:4", recovery="admm", permute=True)
    runs = []
    for name in ("one", "other"):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(Config(prune=prune)))
        pruned_checkpoint(run, 5)
        runs.append(str(run))
    assert main([*runs, "--what", what, "--output", str(tmp_path / "out")]) == 2
    assert "its units have changed places (prune.permute)" in capsys.readouterr().err


def test_a_summary_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(Config()))
    for place in (tmp_path, tmp_path / "run" / "config.yaml" / "s.json"):
        flags = ["--what", "curves", "--output", str(tmp_path / "out"), "--summary", str(place)]
        assert main([str(tmp_path / "run"), *flags]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "choose another" in said


def test_all_leaves_out_what_a_run_cannot_give_and_does_the_rest(tmp_path, capsys) -> None:
    """The log of a run that has left nothing else, not even its model."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(Config(model=ModelConfig(path=str(tmp_path / "nowhere")))))
    lines = [{"step": step, "loss": 2.0 / step, "entropy": 1.0, "sparsity": 0.0} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert (
        main([str(run), "--what", "all", "--output", str(tmp_path / "out"), "--summary", str(tmp_path / "s.json")]) == 0
    )
    told = capsys.readouterr()
    left_out = [line for line in told.err.splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 9
    assert sum("holds no checkpoint" in line for line in left_out) == 3
    assert sum("holds no export" in line for line in left_out) == 2
    assert "| run | 3 | 1.222 | 1.222 | 1 | 1 |" in told.out
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["command"].startswith(f"python -m efx_jax.analysis {run} --what all")
    assert list(summary["between"]) == ["curves"] and summary["runs"] == {"run": {}}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {f"curves_{name}.{kind}" for name in ("loss", "entropy") for kind in ("png", "csv")}
    assert found == figures | {"curves.json", "curves.md", "curves_records.csv"}


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
