"""The numbers of a cell, read from a run's files."""

import json
from pathlib import Path

import pytest

from efx_jax.compare.__main__ import main
from efx_jax.compare.grid import Cell
from efx_jax.compare.records import CellRecord, read_record
from efx_jax.compare.settings import Comparison, read_comparison
from efx_jax.compare.work import measurements
from efx_jax.config import Config, ModelConfig, PruneConfig


def test_the_sparsity_of_a_smaller_model_is_the_share_that_was_cut_out(tmp_path: Path) -> None:
    """Not the zeros of its export, which has none."""
    (tmp_path / "small.yaml").write_text("methods: {atp: {}}\nschedules: {own: {}}\nevaluate: {texts: {general: t}}")
    comparison = read_comparison(tmp_path / "small.yaml")
    cell = Cell("atp", "own", (), 0, Config(), "run", "", "")
    summary = {
        "sparsity": {"q_proj": [0.5]},
        "cut": {"removed": 0.375},
        "seconds": {"train": 2.0},
        "peak_memory_mib": 1.0,
        "tokens": 3,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert read_record(comparison, cell, tmp_path).metrics["sparsity"] == pytest.approx(0.375)


def test_what_another_process_has_finished_meanwhile_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one works on dense alone; while it does, the other one has finished Wanda."""
    done: set[str] = set()

    def finish(comparison: Comparison, cell: Cell, runs: Path) -> str:
        done.update(("dense", "wanda"))
        return ""

    def look(comparison: Comparison, cell: Cell, runs: Path) -> CellRecord:
        is_done = cell.method in done
        return CellRecord(cell, {"perplexity.t": 7.5} if is_done else {}, {}, is_done, "")

    monkeypatch.setattr("efx_jax.compare.__main__.finish", finish)
    monkeypatch.setattr("efx_jax.compare.__main__.read_record", look)
    tree = "methods: {dense: {prune: {sparsity: 0}}, wanda: {}}\nschedules: {own: {}}\nevaluate: {texts: {t: t}}"
    (tmp_path / "two.yaml").write_text(tree)
    flags = ["--config", str(tmp_path / "two.yaml"), "--output", str(tmp_path / "out"), "--only", "dense"]
    assert main(flags) == 0
    rows = json.loads((tmp_path / "out" / "two" / "runs.json").read_text())
    assert {row["method"]: row["status"] for row in rows} == {"dense": "done", "wanda": "done"}


def test_the_numbers_of_a_run_outlive_its_export_and_its_base_and_say_that_dense_is_missing(tmp_path: Path) -> None:
    tree = "methods: {wanda: {}}\nschedules: {own: {}}\nevaluate: {tasks: [hqs]}"
    (tmp_path / "small.yaml").write_text(tree)
    comparison = read_comparison(tmp_path / "small.yaml")
    config = Config(model=ModelConfig(path=str(tmp_path / "gone")), prune=PruneConfig(targets=("q_proj", "k_proj")))
    cell = Cell("wanda", "own", (), 0, config, "run", "dense-run", "")
    summary = {
        "sparsity": {"q_proj": [0.5, 0.5], "k_proj": [0.2, 0.2], "up_proj": [0, 0]},
        "entries": {"q_proj": 32, "k_proj": 16, "up_proj": 24},
        "seconds": {"train": 2.0},
        "peak_memory_mib": 1.0,
        "tokens": 3,
    }
    answers = measurements(comparison, cell)[0].folder(tmp_path / "run")
    answers.mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    (answers / "summary.json").write_text(json.dumps({"tasks": {"hqs": {"rouge1": 0.5, "rouge1_interval": None}}}))
    found = read_record(comparison, cell, tmp_path)
    # Twice as many rows in q_proj.
    assert found.metrics["sparsity"] == pytest.approx(0.4)
    assert found.note == "dense-run, the dense run, is not measured under likelihood yet"
