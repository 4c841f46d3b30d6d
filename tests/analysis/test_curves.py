"""A run's log read line by line, and what sets two runs apart by their data."""

import dataclasses
import json
from pathlib import Path

import pytest

from efx_jax.analysis.curves import Curve, moving_mean, read_curve, told, window_of
from efx_jax.analysis.runs import Run
from efx_jax.analysis.shifts import pairs_of, run_domains, shift_of
from efx_jax.analysis.space_figures import draw_curves
from efx_jax.config import Config, DataConfig
from efx_jax.errors import InputError


def test_a_log_is_read_in_order_and_a_step_without_labels_keeps_its_sparsity(tmp_path) -> None:
    rows = [
        {"step": 2, "loss": 1.5, "entropy": 2.0, "sparsity": 0.5, "tokens": 9},
        {"step": 1, "loss": 3.0, "entropy": 2.5, "sparsity": 0.0},
        {"step": 3, "sparsity": 0.5},
        {"step": 4, "loss": None, "entropy": 1.75, "sparsity": 0.5},
        {"step": 5, "learning_rate": 0.1},
        {"step": None, "loss": 1.0, "entropy": 2.0, "sparsity": 0.5},
        {"loss": 1.0, "entropy": 2.0, "sparsity": 0.5},
        {"step": 2, "loss": 1.25, "entropy": 2.0, "sparsity": 0.5},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 6, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    curve = read_curve(tmp_path, "a")
    losses, entropies = (3.0, 1.25, None, None), (2.5, 2.0, None, 1.75)
    assert curve == Curve("a", (1, 2, 3, 4), losses, entropies, (0.0, 0.5, 0.5, 0.5))
    assert told(curve, "loss") == ((1, 2), (3.0, 1.25))
    assert told(curve, "entropy") == ((1, 2, 4), (2.5, 2.0, 1.75))


def test_curves_of_a_run_without_any_label_show_what_is_there(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    taught = Curve("taught", (1, 2), (None, None), (None, None), (0.0, 0.5))
    draw_curves(tmp_path, [taught], 1)
    assert {path.name for path in tmp_path.iterdir()} == {"curves_sparsity.csv", "curves_sparsity.png"}
    draw_curves(tmp_path, [taught, Curve("labelled", (1,), (2.0,), (1.0,), (0.0,))], 1)
    assert (tmp_path / "curves_loss.csv").read_text().splitlines()[1:] == ["labelled,1,2.0,,"]


def test_a_run_without_a_log_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"metrics.jsonl: is not there"):
        read_curve(tmp_path, "a")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="found none"):
        read_curve(tmp_path, "a")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff{}")
    with pytest.raises(InputError, match=r"metrics.jsonl: is not UTF-8 text"):
        read_curve(tmp_path, "a")


def test_the_moving_mean_looks_back_only() -> None:
    assert moving_mean((1.0, 2.0, 6.0, 0.0), 2) == (1.0, 1.5, 4.0, 3.0)
    assert moving_mean((1.0, 2.0), 1) == (1.0, 2.0)
    long = Curve("a", tuple(range(150)), (0.0,) * 150, (0.0,) * 150, (0.0,) * 150)
    assert window_of([long, dataclasses.replace(long, steps=(1,))]) == 3


def run(train: str) -> Run:
    return Run(Path(train), Config(data=DataConfig(train=train)), ())


@pytest.mark.parametrize(
    ("first", "second", "shift"),
    [
        ("pubmedqa", "pubmedqa", "same data"),
        ("pubmedqa", "hqs", "other task"),
        ("health", "pubmedqa", "other task"),
        ("casehold", "legal_open", "other task"),
        ("health_open", "legal", "other domain"),
        ("icd10", "billsum", "other domain"),
    ],
)
def test_runs_differ_in_task_or_domain(first, second, shift) -> None:
    runs = [run(first), run(second)]
    one, other = run_domains(runs, ())
    assert shift_of((one, first, 0), (other, second, 0)) == shift
    assert shift_of((one, first, 0), (other, second, 1)) == f"{shift}, other seed"
    assert pairs_of(runs) == [(0, 1)]


def test_a_domain_that_is_not_known_may_be_named() -> None:
    runs = [run("pubmedqa"), run("mine.jsonl")]
    with pytest.raises(InputError, match=r"data.train mine.jsonl has no domain that is known .*--domains"):
        run_domains(runs, ())
    assert run_domains(runs, ("health", "law")) == ("health", "law")
    with pytest.raises(InputError, match="one for each of 2 runs, found 1"):
        run_domains(runs, ("health",))
    with pytest.raises(InputError, match="two runs or more"):
        pairs_of(runs[:1])
