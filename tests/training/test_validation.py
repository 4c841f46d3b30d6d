"""A run that is evaluated on its way, ships its best model, and stops when waiting for a better one is in vain."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import efx_jax.training.loop as loop_module
from efx_jax.config import Config, DataConfig, DistillConfig, EvalConfig, PruneConfig, TrainConfig
from efx_jax.data.tasks import Data, Task
from efx_jax.training.validation import Best, check_validation, metric_values, update_best, validation_steps

pytestmark = pytest.mark.slow

Launch = Callable[..., Path]
FLAGS = ("--preset", "efx", "--eval.every", "2", "--eval.best", "test.accuracy", "--prune.fractions", "0.3")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], list[int]]:
    """Accuracies by step in place of those that are measured, which depend on the tiny model's luck."""

    def script(accuracies: dict[int, float]) -> list[int]:
        asked: list[int] = []
        measure = loop_module.measure

        def found(config, prepared, params, adapters=None, masks=None, names=()):
            results = measure(config, prepared, params, adapters, masks, names)
            if names == ("test",):
                step = sorted(accuracies)[len(asked)]
                asked.append(step)
                results["tasks"]["test"]["accuracy"] = accuracies[step]
            return results

        monkeypatch.setattr(loop_module, "measure", found)
        return asked

    return script


def test_evaluations_come_every_so_many_steps_or_epochs() -> None:
    train = TrainConfig(batch_size=4)
    assert validation_steps(EvalConfig(), train, 10, 9) == frozenset()
    assert validation_steps(EvalConfig(every=4), train, 10, 9) == {4, 8}
    assert validation_steps(EvalConfig(every=4, best="perplexity"), train, 10, 9) == {4, 8, 9}
    assert validation_steps(EvalConfig(every_epochs=1), train, 10, 9) == {2, 5, 8}
    assert validation_steps(EvalConfig(every_epochs=0.5, best="perplexity"), train, 10, 5) == {1, 2, 4, 5}


def test_the_best_is_the_first_of_the_best_and_counts_what_came_after() -> None:
    best = None
    for step, value in enumerate((0.5, 0.7, 0.7, 0.6), start=1):
        best = update_best(best, "test.macro_f1", step, value, 100 * step)
    assert best == Best("test.macro_f1", step=2, value=0.7, stale=2, tokens=200)
    assert update_best(update_best(None, "a.accuracy", 1, math.nan, 0), "a.accuracy", 2, 0.1, 0).step == 2
    assert update_best(best, "perplexity", 5, 0.6, 9) == Best("perplexity", step=5, value=0.6, stale=0, tokens=9)


def test_metrics_go_by_task_and_name() -> None:
    tasks = {"a": {"accuracy": 0.5, "macro_f1": 0.4, "rows": 3}, "b": {"rouge1": 0.3, "rouge2": 0.2, "rougeL": 0.1}}
    assert metric_values({"perplexity": {"value": 9.0}, "tasks": tasks}) == {
        "perplexity": 9.0,
        "a.accuracy": 0.5,
        "a.macro_f1": 0.4,
        "b.rouge1": 0.3,
        "b.rouge2": 0.2,
        "b.rougeL": 0.1,
    }


def test_the_best_model_ships_and_not_the_last(
    launch: Launch, scripted: Callable[[dict[int, float]], list[int]], tmp_path: Path
) -> None:
    """At step 2 the event has just been, and the best is step 4 of 6: what was measured there is what is exported."""
    asked = scripted({2: 0.3, 4: 0.9, 6: 0.4})
    run = launch(tmp_path / "run", *FLAGS, "--eval.tasks", "test")
    assert asked == [2, 4, 6]
    rows = rows_of(run / "evaluations.jsonl")
    assert [(row["step"], row["test.accuracy"]) for row in rows] == [(2, 0.3), (4, 0.9), (6, 0.4)]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best"], summary["steps"]) == (
        {"metric": "test.accuracy", "step": 4, "value": 0.9, "stale": 1, "tokens": 48},
        4,
    )
    assert [path.name for path in (run / "best").iterdir()] == ["4"]
    exported = summary["results"]["sparse expert"]["perplexity"]["value"]
    assert exported == pytest.approx(rows[1]["perplexity"], rel=1e-6)
    assert exported != pytest.approx(rows[2]["perplexity"], rel=1e-4)


def test_a_best_model_that_a_run_of_before_left_does_not_keep_a_new_one_from_being_saved(
    launch: Launch, scripted: Callable[[dict[int, float]], list[int]], tmp_path: Path
) -> None:
    flags = (*FLAGS, "--eval.tasks", "test")
    scripted({2: 0.3, 4: 0.9, 6: 0.4} | {12: 0.8, 14: 0.5, 16: 0.4})  # of the second run
    run = launch(tmp_path / "run", *flags)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    launch(run, *flags)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best"]["step"], [path.name for path in (run / "best").iterdir()]) == (2, ["2"])
    exported = summary["results"]["sparse expert"]["perplexity"]["value"]
    assert exported == pytest.approx(rows_of(run / "evaluations.jsonl")[0]["perplexity"], rel=1e-6)


def test_a_model_without_its_sparsity_is_never_the_best(
    launch: Launch, scripted: Callable[[dict[int, float]], list[int]], tmp_path: Path
) -> None:
    scripted({2: 0.9, 4: 0.3, 6: 0.2})
    run = launch(tmp_path / "run", *FLAGS, "--eval.tasks", "test", "--prune.fractions", "0.6")
    best = json.loads((run / "summary.json").read_text())["best"]
    assert best == {"metric": "test.accuracy", "step": 4, "value": 0.3, "stale": 1, "tokens": 48}


def test_it_stops_after_so_many_evaluations_without_a_better_one_and_stays_stopped(
    launch: Launch,
    scripted: Callable[[dict[int, float]], list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (*FLAGS, "--eval.tasks", "test", "--eval.patience", "1", "--train.steps", "10")
    asked = scripted({2: 0.3, 4: 0.9, 6: 0.4, 8: 1.0})
    run = launch(tmp_path / "run", *flags)
    assert asked == [2, 4, 6]
    assert rows_of(run / "metrics.jsonl")[-1]["step"] == 6
    (run / "summary.json").unlink()
    launch(run, *flags)
    assert asked == [2, 4, 6]
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    (run / "summary.json").unlink()
    shutil.rmtree(run / "best")
    launch(run, *flags, code=2)
    assert "best: the checkpoint of step 4, the best, is not there" in capsys.readouterr().err


def test_an_interrupted_run_evaluates_nothing_twice_and_ships_the_same_best(
    launch: Launch,
    scripted: Callable[[dict[int, float]], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = (*FLAGS, "--eval.tasks", "test")
    asked = scripted({2: 0.3, 4: 0.9, 6: 0.4})
    with monkeypatch.context() as patch:
        answers = iter([False] * 5 + [True])
        patch.setattr(loop_module, "asked", lambda stop: next(answers))
        run = launch(tmp_path / "run", *flags, code=130)
    assert asked == [2, 4]
    launch(run, *flags)
    assert asked == [2, 4, 6]
    rows = rows_of(run / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best"] == {"metric": "test.accuracy", "step": 4, "value": 0.9, "stale": 1, "tokens": 48}
    exported = summary["results"]["sparse expert"]["perplexity"]["value"]
    assert exported == pytest.approx(rows[1]["perplexity"], rel=1e-6)


def test_names_that_are_not_measured_are_refused(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, said in (
        (("--eval.every", "2", "--eval.tasks", "tset"), "eval.tasks: tset is no task of this run; it has test"),
        (("--eval.every", "2", "--eval.best", "test.rougeL"), "expected one of perplexity, test.accuracy"),
        (("--eval.best", "perplexity"), "eval.best must be set together with eval.every"),
        (("--eval.every", "2", "--eval.patience", "1"), "eval.patience must be 0 without eval.best"),
    ):
        for plan in ((), ("--dry-run",)):
            launch(tmp_path / "run", "--preset", "efx", *flags, *plan, code=2)
            assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ("mine.accuracy", "the test rows of mine choose the best model, .* give a task of other rows in data.test"),
        ("casehold.accuracy", "the test rows of casehold choose .* give casehold:validation in data.test"),
        ("casehold:validation.accuracy", None),
        ("perplexity", None),
    ],
)
def test_a_model_chosen_by_the_rows_that_it_is_scored_on_is_warned_of(
    best: str, said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    tasks = tuple(Task(name, [], ("yes", "no")) for name in ("mine", "casehold", "casehold:validation"))
    check_validation(Config(eval=EvalConfig(best=best)), Data([], tasks, ["text"], {"text": "own.jsonl"}))
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == bool(said) and all(re.search(said or "", one) for one in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prune": PruneConfig(calibration=("train", "wikitext"))}, "is prune.calibration too"),
        ({"distill": DistillConfig(teacher="base", text="wikitext")}, "is distill.text too"),
        ({"distill": DistillConfig(text="wikitext")}, None),
        ({"prune": PruneConfig(calibration=("wikitext",), sparsity=0)}, None),
    ],
)
def test_a_text_that_is_measured_and_learned_from_is_warned_of(
    change: dict[str, Any], said: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    # The text comes with the task that is learned: data.text is empty.
    check_validation(Config(data=DataConfig(text=""), **change), Data([], (), ["text"], {"text": "wikitext"}))
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == bool(said) and all(f"data.text wikitext: {said}" in one for one in found)
