"""Rel.% follows its formula, and compares only what was measured alike."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.errors import InputError
from efx_jax.evaluation import scores
from efx_jax.evaluation.relative import check_pairs, check_ratios, read_evaluation, relative
from efx_jax.evaluation.results import summarise, summarise_texts
from efx_jax.evaluation.rouge import ROUGE
from efx_jax.evaluation.scores import macro_f1

LABELS = (" a", " b", " c")


def choice(seed: int, skill: float, rows: int = 120, runs: int = 1, group: int = 1) -> tuple[dict, list[dict]]:
    """A task whose rows do not depend on the seed, answered right with a probability."""
    reference = np.random.default_rng(99).integers(0, 3, rows)
    generator = np.random.default_rng(seed)
    guesses = generator.integers(-1, 3, (runs, rows))
    predicted = np.where(generator.random((runs, rows)) < skill, reference, guesses)
    return labelled(reference, predicted, group)


def labelled(reference: np.ndarray, predicted: np.ndarray, group: int = 1) -> tuple[dict, list[dict]]:
    names = {number: label.strip() for number, label in enumerate(LABELS)} | {-1: None}
    records = [
        {
            "task": "choice",
            "run": run,
            "row": row,
            "group": row // group,
            "gold": names[reference[row]],
            "prediction": names[answer],
        }
        for run, answers in enumerate(predicted)
        for row, answer in enumerate(answers)
    ]
    result = summarise(predicted, [Example("p", LABELS[number]) for number in reference], LABELS)
    return result | {"runs": len(predicted), "protocol": "greedy", "rows_sha256": "same"}, records


def predictions(reference: np.ndarray, predicted: np.ndarray) -> tuple[dict, list[dict]]:
    return joined(choice=labelled(reference, predicted[None]))


def text(name: str, seed: int, factor: float, rows: int = 50) -> tuple[dict, list[dict]]:
    scores = factor * np.random.default_rng(seed).uniform(0.2, 0.8, (1, rows, 3))
    records = [
        {"task": name, "run": 0, "row": row, "group": row} | dict(zip(ROUGE, scores[0, row], strict=True))
        for row in range(rows)
    ]
    return summarise_texts(scores, [Example("p", " r")] * rows) | {
        "runs": 1,
        "protocol": "greedy",
        "rows_sha256": "same",
    }, records


def joined(**tasks: tuple[dict, list[dict]]) -> tuple[dict, list[dict]]:
    return {name: result for name, (result, _) in tasks.items()}, [r for _, records in tasks.values() for r in records]


def test_the_formula_on_two_tasks_with_labels_and_one_of_free_text() -> None:
    found = {
        "one": {"accuracy": 0.6, "macro_f1": 0.5},
        "two": {"accuracy": 0.3, "macro_f1": 0.2},
        "three": {"rouge1": 0.4, "rouge2": 0.1, "rougeL": 0.3},
    }
    dense = {
        "one": {"accuracy": 0.8, "macro_f1": 0.5},
        "two": {"accuracy": 0.4, "macro_f1": 0.4},
        "three": {"rouge1": 0.5, "rouge2": 0.2, "rougeL": 0.3},
    }
    rest = {"rows": 1, "runs": 1}
    classes = {"classes": {"a": {}, "b": {}}}
    records = [
        *({"task": task, "run": 0, "row": 0, "group": 0, "gold": "a", "prediction": "a"} for task in ("one", "two")),
        {"task": "three", "run": 0, "row": 0, "group": 0, "rouge1": 0.4, "rouge2": 0.1, "rougeL": 0.3},
    ]
    with_rows = [
        {name: result | rest | (classes if "accuracy" in result else {}) for name, result in scores.items()}
        for scores in (found, dense)
    ]
    found_relative = relative(with_rows[0], records, with_rows[1], records)
    # accuracies 0.75 + 0.75, F1 1 + 0.5, ROUGE mean of 0.8, 0.5, 1; two tasks: 2 n + 1 = 5.
    assert found_relative["value"] == pytest.approx(100 * (1.5 + 1.5 + 2.3 / 3) / 5)
    assert found_relative["interval"] is None  # of a single row


def test_a_model_is_all_of_itself() -> None:
    results, records = joined(choice=choice(0, 0.5, runs=3), bills=text("bills", 1, 0.5))
    found = relative(results, records, results, records)
    assert found["value"] == pytest.approx(100)
    assert found["interval"] == pytest.approx([100, 100])


def test_several_tasks_of_free_text_enter_as_one_mean() -> None:
    half = {"bills": text("bills", 1, 0.5), "questions": text("questions", 2, 0.25), "choice": choice(0, 0.5)}
    whole = {"bills": text("bills", 1, 1.0), "questions": text("questions", 2, 1.0), "choice": choice(0, 0.5)}
    found = relative(*joined(**half), *joined(**whole))
    assert found["value"] == pytest.approx(100 * (1 + 1 + (0.5 + 0.25) / 2) / 3)
    alone = relative(*joined(bills=half["bills"]), *joined(bills=whole["bills"]))
    assert alone["value"] == pytest.approx(50)
    assert alone["interval"] == pytest.approx([50, 50])


def test_without_free_text_the_divisor_is_the_number_of_ratios() -> None:
    found, dense = joined(choice=choice(1, 0.5)), joined(choice=choice(2, 0.9))
    one, other = found[0]["choice"], dense[0]["choice"]
    expected = 50 * (one["accuracy"] / other["accuracy"] + one["macro_f1"] / other["macro_f1"])
    result = relative(*found, *dense)
    assert result["value"] == pytest.approx(expected)
    low, high = result["interval"]
    assert low < expected < high < 100


def test_runs_may_differ_in_number() -> None:
    found, dense = joined(choice=choice(1, 0.5, runs=4)), joined(choice=choice(2, 0.9, runs=2))
    low, high = relative(*found, *dense)["interval"]
    assert low < relative(*found, *dense)["value"] < high


def test_resamples_of_many_rows_are_never_all_held(monkeypatch: pytest.MonkeyPatch) -> None:
    found = joined(choice=choice(1, 0.5, rows=600), bills=text("bills", 1, 0.5, rows=600))
    dense = joined(choice=choice(2, 0.9, rows=600), bills=text("bills", 2, 1.0, rows=600))
    whole = relative(*found, *dense)
    monkeypatch.setattr(scores, "_BLOCK", 12_000)
    tracemalloc.start()
    blocks = relative(*found, *dense)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # of 10 MB
    assert blocks["interval"] == pytest.approx(whole["interval"], rel=1e-12)


def test_the_interval_draws_the_same_groups_for_both_models() -> None:
    found, dense = joined(choice=choice(1, 0.5, group=10)), joined(choice=choice(2, 0.9, group=10))
    numbers = {None: -1} | {label.strip(): number for number, label in enumerate(LABELS)}
    reference = np.asarray([numbers[record["gold"]] for record in found[1]])
    answers = [np.asarray([numbers[record["prediction"]] for record in records]) for _, records in (found, dense)]
    ratios = []
    for draw in range(4000):
        contracts = np.random.default_rng([3, draw]).integers(0, 12, 12)
        rows = (10 * contracts[:, None] + np.arange(10)).ravel()
        right = [np.mean(own[rows] == reference[rows]) for own in answers]
        f1 = [macro_f1(own[rows], reference[rows], 3)[0] for own in answers]
        ratios.append(50 * (right[0] / right[1] + f1[0] / f1[1]))
    assert relative(*found, *dense)["interval"] == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.5)
    by_row = relative(*joined(choice=choice(1, 0.5)), *dense)["interval"]
    assert by_row != pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=1)


def test_tasks_are_drawn_independently() -> None:
    """Of two tasks alike the mean varies less than either, by the root of two."""

    def named(model: tuple[dict, list[dict]], names: tuple[str, ...]) -> tuple[dict, list[dict]]:
        result, records = model
        return joined(**{name: (result, [record | {"task": name} for record in records]) for name in names})

    one, dense = choice(1, 0.5), choice(2, 0.9)
    (low, high), (less, more) = (
        relative(*named(one, names), *named(dense, names))["interval"] for names in (("choice",), ("choice", "other"))
    )
    assert (more - less) / (high - low) == pytest.approx(0.5**0.5, abs=0.08)


def test_a_score_of_zero_has_no_ratio() -> None:
    with pytest.raises(InputError, match="dense: the dense model's rouge1 on bills is 0, .* again without bills"):
        check_ratios(*joined(bills=text("bills", 1, 0.0)), Path("dense"))


def test_there_is_no_interval_where_many_resamples_of_the_dense_model_have_no_score() -> None:
    """Right in one row of 200, it is wrong in all rows of every third resample."""
    reference = np.arange(200) % 3
    wrong = (reference + 1) % 3
    found = predictions(reference, np.where(np.arange(200) < 4, reference, wrong))
    assert relative(*found, *predictions(reference, np.where(np.arange(200) < 1, reference, wrong)))["interval"] is None
    low, high = relative(*found, *predictions(reference, np.where(np.arange(200) < 12, reference, wrong)))["interval"]
    assert 0 < low < 100 * 4 / 12 < high


def test_lost_predictions_are_noticed() -> None:
    results, records = joined(choice=choice(0, 0.5))
    with pytest.raises(InputError, match="predictions of choice: expected 120, found 119"):
        check_ratios(results, records[:-1], Path("dense"))
    for garbled in ({"task": "choice"}, records[0] | {"prediction": "z"}, records[0] | {"run": 7}):
        with pytest.raises(InputError, match="dense: predictions of choice are garbled"):
            check_ratios(results, [*records[1:], garbled], Path("dense"))
    # Of an evaluation of an earlier version: the groups would be missed after the whole of the new one.
    for group in ({}, {"group": None}, {"group": "first"}):
        changed = [{name: value for name, value in record.items() if name != "group"} | group for record in records]
        with pytest.raises(InputError, match="dense: predictions of choice are garbled"):
            check_ratios(results, changed, Path("dense"))
    check_ratios(results, records, Path("dense"))


@pytest.mark.parametrize(
    ("found", "dense", "message"),
    [
        (
            {"a": {}, "b": {}, "c": {}},
            {"b": {}},
            "^dense: no a, c; evaluate both models on the same --tasks, or this one without a, c",
        ),
        (
            {"b": {}},
            {"a": {}, "b": {}},
            "^the tasks to compare with dense: no a; .* or the dense model again without a",
        ),
        ({"a": {}}, {"a": {"protocol": "greedy"}}, "a was evaluated under greedy, here it is under sampled"),
        ({"a": {}}, {"a": {"normalize": "mean"}}, "a was evaluated with normalize mean, here with None"),
        ({"a": {"new_tokens": 9}}, {"a": {}}, "a was evaluated with new_tokens None, here with 9"),
        ({"a": {}}, {"a": {"rows": 7, "rows_sha256": "x"}}, r"a has other rows or prompts \(7 rows there, 5 here\)"),
    ],
)
def test_only_the_same_tasks_rows_and_protocol_are_compared(found, dense, message) -> None:
    base = {"protocol": "sampled", "rows": 5, "rows_sha256": "r", "normalize": None, "new_tokens": None}
    with pytest.raises(InputError, match=message):
        check_pairs(
            {name: base | own for name, own in found.items()},
            {name: base | own for name, own in dense.items()},
            Path("dense"),
        )


def test_equal_descriptions_pass() -> None:
    base = {"protocol": "likelihood", "rows": 5, "rows_sha256": "r", "normalize": "sum", "new_tokens": None}
    check_pairs({"a": base}, {"a": base}, Path("dense"))


def test_a_text_may_hold_other_line_ends(tmp_path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"tasks": {"a": {"rows": 1}}}))
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"answer": "one\u2028two\x85"}, ensure_ascii=False) + "\n")
    assert read_evaluation(tmp_path) == ({"a": {"rows": 1}}, [{"answer": "one\u2028two\x85"}])


@pytest.mark.parametrize(
    ("summary", "predictions", "message"),
    [
        (None, "", "summary.json: no such file"),
        ("{}", None, "predictions.jsonl: no such file"),
        ("{", "", "garbled"),
        ("[]", "", "garbled"),
        ('{"tasks": {"a": {}}}', '{"a": 1', "garbled"),
        ('{"results": {}}', "", "holds no scores of tasks"),
    ],
)
def test_a_folder_that_is_no_evaluation_is_refused(tmp_path, summary, predictions, message) -> None:
    for name, content in (("summary.json", summary), ("predictions.jsonl", predictions)):
        if content is not None:
            (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_evaluation(tmp_path)
