"""Ratios of perplexities on the same windows: against their definition, and how a table tells them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from efx_jax.compare.grid import list_cells
from efx_jax.compare.paired import Windows, perplexity_ratio
from efx_jax.compare.records import CellRecord
from efx_jax.compare.settings import read_comparison
from efx_jax.compare.table import write_tables
from efx_jax.config_values import replace_values

TOKENS = np.array([50, 80, 20, 50, 90, 60, 30, 70, 40, 10])
GRID = """
methods: {dense: {prune: {sparsity: 0}}, wanda: {prune: {score: wanda}}, ria: {prune: {score: ria}}}
schedules: {during: {prune: {schedule: epochs}}}
evaluate: {texts: {general: wikitext}}
reference: dense
seeds: [0, 1]
axes: {prune.sparsity: [0.4, 0.5]}
"""


def windows(per_token: float, noise: np.ndarray) -> Windows:
    return Windows(TOKENS * (per_token + noise), TOKENS)


@pytest.fixture(scope="module")
def hard() -> np.ndarray:
    """What makes a window hard for every model."""
    return np.random.default_rng(0).standard_normal(len(TOKENS))


def test_the_ratio_is_that_of_perplexities_and_what_is_shared_cancels(hard: np.ndarray) -> None:
    found = perplexity_ratio({0: windows(3.2, hard)}, {0: windows(3.0, hard)})
    assert found is not None and found[1] is not None
    np.testing.assert_allclose((found[0], *found[1]), np.exp(0.2), rtol=1e-9)


def test_a_ratio_too_large_for_a_number_is_none(hard: np.ndarray) -> None:
    assert perplexity_ratio({0: windows(800.0, hard)}, {0: windows(3.0, hard)}) is None


def test_the_interval_is_that_of_a_paired_bootstrap_by_hand(hard: np.ndarray) -> None:
    apart = np.random.default_rng(1).normal(0.1, 0.3, len(TOKENS))
    found = perplexity_ratio({0: windows(3.0, hard + apart)}, {0: windows(3.0, hard)})
    draws = np.random.default_rng(2).integers(0, len(TOKENS), (4000, len(TOKENS)))
    byhand = np.exp((TOKENS * apart)[draws].sum(1) / TOKENS[draws].sum(1))
    assert found is not None and found[1] is not None
    assert found[0] == pytest.approx(np.exp((TOKENS * apart).sum() / TOKENS.sum()))
    np.testing.assert_allclose(found[1], np.quantile(byhand, [0.025, 0.975]), rtol=0.02)


def test_of_several_seeds_the_interval_is_students_and_only_shared_ones_count(hard: np.ndarray) -> None:
    """Without noise in the windows what is left of it is that of the seeds: of two, 12.7 standard errors."""
    found = perplexity_ratio(
        {0: windows(3.1, hard), 1: windows(3.3, hard), 5: windows(9.0, hard)},
        {0: windows(3.0, hard), 1: windows(3.0, hard), 4: windows(1.0, hard)},
    )
    assert found is not None
    assert found[0] == pytest.approx(np.exp(0.2))
    assert found[1] == pytest.approx((np.exp(0.2 - 12.7062 * 0.1), np.exp(0.2 + 12.7062 * 0.1)), rel=1e-4)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_of_few_seeds_holds_the_truth_as_often_as_it_says(seeds: int, hard: np.ndarray) -> None:
    """Equal models, with noise in seeds and windows; a bootstrap over seeds would hold 1 in 53 and 78 % of cases."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        pair = [
            {seed: windows(3.0 + rng.normal(0, 0.05), hard + rng.normal(0, 0.1, len(TOKENS))) for seed in range(seeds)}
            for _ in range(2)
        ]
        found = perplexity_ratio(*pair)
        assert found is not None and found[1] is not None
        held += found[1][0] <= 1 <= found[1][1]
    assert 0.92 <= held / 400 <= 0.995


def test_what_does_not_pair_has_no_ratio(hard: np.ndarray) -> None:
    other = Windows(np.ones(3), np.array([5, 5, 5]))
    assert perplexity_ratio({0: windows(3.0, hard)}, {1: windows(3.0, hard)}) is None
    assert perplexity_ratio({0: windows(3.0, hard)}, {0: other}) is None
    here, there = (dataclasses.replace(windows(3.0, hard), text=text) for text in ("0a", "0b"))
    assert perplexity_ratio({0: here}, {0: there}) is None
    assert perplexity_ratio({0: here}, {0: windows(3.0, hard)}) is not None
    one = Windows(np.array([6.0]), np.array([2])), Windows(np.array([4.0]), np.array([2]))
    assert perplexity_ratio({0: one[0]}, {0: one[1]}) == (pytest.approx(np.e), None)


def test_an_axis_without_a_say_in_one_of_two_rows_sets_no_rivals_apart(tmp_path: Path, hard: np.ndarray) -> None:
    text = GRID.replace("ria: {prune: {score: ria}}", "taught: {distill: {teacher: base}}")
    text = text.replace("prune.sparsity: [0.4, 0.5]", "distill.share: [0.25, 0.5]")
    (tmp_path / "grid.yaml").write_text(text)
    comparison = read_comparison(tmp_path / "grid.yaml")
    nats = {("dense", None): 3.0, ("wanda", None): 3.3, ("taught", 0.25): 3.2, ("taught", 0.5): 3.1}
    records = []
    for cell in list_cells(comparison):
        found = windows(nats[cell.method, *cell.axes], hard)
        perplexity = float(np.exp(found.nll.sum() / found.tokens.sum()))
        records.append(CellRecord(cell, {"perplexity.general": perplexity}, {}, True, "", {"general": found}))
    write_tables(comparison, records, {}, {}, tmp_path)
    best = {
        (row["method"], row["axes"]["distill.share"]): row["ratios"]["general over the best other"]
        for row in json.loads((tmp_path / "table.json").read_text())
        if row["schedule"]
    }
    # Wanda is beside the better share; shares are a column of their own.
    assert {ratio["other"] for ratio in best.values()} == {"taught/during", "wanda/during"}
    assert best["wanda", None]["value"] == pytest.approx(np.exp(0.2))
    assert best["taught", 0.25]["other"] == best["taught", 0.5]["other"] == "wanda/during"


def test_the_best_other_is_the_best_on_the_seeds_that_both_have(tmp_path: Path, hard: np.ndarray) -> None:
    """Who has only the easiest seed looks best, and may have none in common."""
    text = GRID.replace("[0, 1]", "[0, 1, 2]").replace("[0.4, 0.5]", "[0.5]")
    (tmp_path / "grid.yaml").write_text(
        text.replace("methods: {", "methods: {magnitude: {prune: {score: magnitude}}, ")
    )
    comparison = read_comparison(tmp_path / "grid.yaml")
    held = {"magnitude": {1: 3.25, 2: 3.25}, "wanda": {0: 2.7}, "ria": {0: 2.8, 1: 3.3, 2: 3.3}}
    records = []
    for cell in list_cells(comparison):
        if cell.seed in held.get(cell.method, {}):
            found = windows(held[cell.method][cell.seed], hard)
            perplexity = float(np.exp(found.nll.sum() / found.tokens.sum()))
            records.append(CellRecord(cell, {"perplexity.general": perplexity}, {}, True, "", {"general": found}))
    write_tables(comparison, records, {}, {}, tmp_path)
    rows = {row["method"]: row["ratios"] for row in json.loads((tmp_path / "table.json").read_text())}
    best = {method: ratios["general over the best other"] for method, ratios in rows.items()}
    assert {method: ratio["other"] for method, ratio in best.items()} == {
        "magnitude": "ria/during",
        "ria": "wanda/during",
        "wanda": "ria/during",
    }
    assert best["magnitude"]["value"] == pytest.approx(np.exp(-0.05))
    assert best["ria"]["value"] == pytest.approx(np.exp(0.1))


def test_a_table_sets_every_row_beside_dense_and_the_best_other(tmp_path: Path, hard: np.ndarray) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    comparison = read_comparison(tmp_path / "grid.yaml")
    nats = {"dense": 3.0, "wanda": 3.3, "ria": 3.2}
    records = []
    for cell in list_cells(comparison):
        value = nats[cell.method] + (0.1 if cell.config.prune.sparsity == 0.5 else 0.0)
        text = windows(value, hard)
        perplexity = float(np.exp(text.nll.sum() / text.tokens.sum()))
        records.append(CellRecord(cell, {"perplexity.general": perplexity}, {}, True, "", {"general": text}))
    table = write_tables(comparison, records, {}, {}, tmp_path)
    assert "| method | schedule | asked % | general over dense | general over the best other |" in table
    assert "| wanda | during | 40 | 1.350 [1.350, 1.350] of dense | 1.105 [1.105, 1.105] of ria/during |" in table
    assert "| ria | during | 50 | 1.350 [1.350, 1.350] of dense | 0.905 [0.905, 0.905] of wanda/during |" in table
    rows = {
        (row["method"], row["asked_sparsity"]): row["ratios"]
        for row in json.loads((tmp_path / "table.json").read_text())
    }
    assert rows["dense", 0.0] == {}
    assert rows["ria", 0.4]["general over the best other"]["other"] == "wanda/during"
    assert rows["ria", 0.4]["general over dense"]["value"] == pytest.approx(np.exp(0.2))
    # A pattern has rivals of its own.
    bound = []
    for record in records:
        config = replace_values(record.cell.config, {"prune.group": "2:4"} if record.cell.method == "ria" else {})
        bound.append(dataclasses.replace(record, cell=dataclasses.replace(record.cell, config=config)))
    assert "general over the best other" not in write_tables(comparison, bound, {}, {}, tmp_path)
    # Evaluations of before windows were told.
    bare = [CellRecord(record.cell, record.metrics, {}, True, "") for record in records]
    assert "Side by side" not in write_tables(comparison, bare, {}, {}, tmp_path)
