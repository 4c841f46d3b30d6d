"""What the tables tell of intervals: behind the value of one seed, beside the mean of several."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from efx_jax.compare.grid import Cell, list_cells
from efx_jax.compare.records import CellRecord
from efx_jax.compare.settings import Comparison, read_comparison
from efx_jax.compare.table import write_tables

GRID = """
methods: {dense: {prune: {sparsity: 0}}, wanda: {prune: {score: wanda}}}
schedules: {during: {prune: {schedule: epochs}}}
evaluate: {texts: {general: wikitext}, tasks: [pubmedqa]}
reference: dense
"""
ACCURACY = "likelihood.pubmedqa.accuracy"
Read = Callable[[str], Comparison]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_text(seeds: str) -> Comparison:
        (tmp_path / "grid.yaml").write_text(f"{GRID}seeds: [{seeds}]\n")
        return read_comparison(tmp_path / "grid.yaml")

    return read_text


def record(cell: Cell) -> CellRecord:
    """Perplexity 1234.5 with an interval, accuracy 60 % with one, Rel.% with none, seconds which never have one."""
    metrics = {"train_seconds": 3.0, "perplexity.general": 1234.5 + cell.seed, ACCURACY: 0.6}
    intervals = {"perplexity.general": (1200.25, 1300.0), ACCURACY: (0.5, 0.75)}
    return CellRecord(cell, metrics | {"likelihood.relative": 90.0}, intervals, True, "")


def test_one_seed_has_its_interval_in_the_cell(read: Read, tmp_path: Path) -> None:
    comparison = read("0")
    text = write_tables(comparison, [record(cell) for cell in list_cells(comparison)], {}, {}, tmp_path)
    assert "| 1,234.50 [1,200.25, 1,300.00] | 60.00 [50.00, 75.00] | 90.00 |" in text
    assert "In brackets: 95 % bootstrap intervals" in text and "| 3.0 |" in text


def test_of_several_seeds_the_cell_keeps_its_deviation(read: Read, tmp_path: Path) -> None:
    comparison = read("0, 1")
    found = [record(cell) for cell in list_cells(comparison)]
    text = write_tables(comparison, found, {}, {}, tmp_path)
    assert "| 1,235.00 ± 0.71 | 60.00 ± 0.00 | 90.00 ± 0.00 |" in text and "[" not in text
    # Of which only one is there.
    text = write_tables(comparison, found[:1], {}, {}, tmp_path)
    assert "| 1,234.50 (1) | 60.00 (1) | 90.00 (1) |" in text


def test_every_seed_has_its_interval_in_the_files(read: Read, tmp_path: Path) -> None:
    comparison = read("0, 1")
    write_tables(comparison, [record(cell) for cell in list_cells(comparison)], {}, {}, tmp_path)
    with (tmp_path / "runs.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["seed"] for line in lines] == ["0", "0", "1", "1"]
    for line in lines:
        assert (line[f"{ACCURACY}_low"], line[f"{ACCURACY}_high"]) == ("0.5", "0.75")
        assert (line["perplexity.general_low"], line["perplexity.general_high"]) == ("1200.25", "1300.0")
    assert {"likelihood.relative_low", "train_seconds_low"} & set(lines[0]) == set()
    for entry in json.loads((tmp_path / "runs.json").read_text()):
        assert entry["intervals"] == {"perplexity.general": [1200.25, 1300.0], ACCURACY: [0.5, 0.75]}
    for row in json.loads((tmp_path / "table.json").read_text()):
        assert row["metrics"][ACCURACY]["interval"] is None


def test_what_another_process_has_finished_has_not_failed(read: Read, tmp_path: Path) -> None:
    comparison = read("0")
    whole = [record(cell) for cell in list_cells(comparison)]
    failures = {cell.cell.run: "another comparison is at this work" for cell in whole}
    text = write_tables(comparison, whole, failures, {}, tmp_path)
    assert "failed" not in text
    assert {row["status"] for row in csv.DictReader((tmp_path / "runs.csv").open())} == {"done"}
    half = [dataclasses.replace(one, is_whole=False) for one in whole]
    assert "failed: dense, seed 0: another comparison" in write_tables(comparison, half, failures, {}, tmp_path)
    assert {row["status"] for row in csv.DictReader((tmp_path / "runs.csv").open())} == {"failed"}
