"""The numbers of a cell, read from a run's files."""

import json
from pathlib import Path

import pytest

from efx_jax.compare.grid import Cell
from efx_jax.compare.records import read_record
from efx_jax.compare.settings import read_comparison
from efx_jax.config import Config


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
