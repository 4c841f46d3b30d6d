"""A run that takes over what another has learned ends as it would have by itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efx_jax.training.loop as loop_module
import efx_jax.training.stores as stores_module
from efx_jax.config_io import from_yaml
from efx_jax.config_values import replace_values
from efx_jax.errors import InputError
from efx_jax.training.run import run
from tests.tiny import linears

pytestmark = pytest.mark.slow

SAVE_ALL = ("--train.checkpoint_every", "1", "--train.keep", "9", "--eval.every", "1")
WANDA = ("--preset", "paper", "--prune.recovery", "none", "--prune.score", "wanda", *SAVE_ALL)
SCHEDULES = {
    "after the last update": ("--prune.schedule", "fractions", "--prune.fractions", "1"),
    "in the middle, at events that move the base": ("--prune.recovery", "admm"),
    "before the first update": ("--prune.schedule", "fractions", "--prune.fractions", "0"),
}
FIRST_EVENT = dict(zip(SCHEDULES, (6, 2, 0), strict=True))


@pytest.fixture(scope="module")
def trunk(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("runs") / "dense", *WANDA, "--prune.sparsity", "0")


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_ends_as_it_would_have_by_itself(
    name: str, trunk: Path, launch: Any, metrics_of: Any, tmp_path: Path
) -> None:
    alone = launch(tmp_path / "alone", *WANDA, *SCHEDULES[name])
    grown = tmp_path / "grown"
    summary = run(from_yaml((alone / "config.yaml").read_text(), ""), grown, trunk=trunk)
    expected = json.loads((alone / "summary.json").read_text())
    for key in ("results", "events", "steps", "tokens", "sparsity"):
        assert summary[key] == expected[key], key
    for matrix, weight in linears(alone / "export").items():
        np.testing.assert_array_equal(linears(grown / "export")[matrix], weight)
    rows, own, others = metrics_of(grown), metrics_of(alone), metrics_of(trunk)
    assert without_speed(rows) == without_speed(own)
    # The lines up to the event are the trunk's, with its speed: those updates were not done again.
    assert rows[: FIRST_EVENT[name]] == others[: FIRST_EVENT[name]]
    evaluations = [(run_folder / "evaluations.jsonl").read_text() for run_folder in (grown, alone)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("is_mended", [False, True])
def test_the_base_is_measured_again_where_the_trunk_was_measured_on_other_rows(
    is_mended: bool, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"base": {"perplexity": {"value": 1.0, "interval": None, "tokens": 1}}}
    monkeypatch.setattr(loop_module, "measure_start", lambda *_: again)
    if is_mended:
        monkeypatch.setattr(stores_module, "tasks_checksum", lambda *_: 7)
    dense = from_yaml((trunk / "config.yaml").read_text(), "")
    late = {"prune.sparsity": 0.5, "prune.schedule": "fractions", "prune.fractions": (1.0,)}
    summary = run(replace_values(dense, late), tmp_path / "run", trunk=trunk)
    assert (summary["results"]["base"] == again["base"]) == is_mended


def test_another_training_is_no_trunk(trunk: Path, tmp_path: Path) -> None:
    dense = from_yaml((trunk / "config.yaml").read_text(), "")
    other = replace_values(dense, {"prune.sparsity": 0.5, "lora.rank": 3, "seed": 5})
    with pytest.raises(InputError, match=r"not this training without pruning \(lora.rank, seed\); leave it out"):
        run(other, tmp_path / "run", trunk=trunk)


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
