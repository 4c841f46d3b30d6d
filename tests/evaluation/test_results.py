"""A result says what its runs say together."""

import json

import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.evaluation.results import markdown_table, metric_cell, summarise, summarise_texts

LABELS = (" yes", " no")
ROWS = [Example("p", " yes")] * 3 + [Example("p", " no")] * 2


def test_equal_runs_are_one_run_without_deviation() -> None:
    answers = np.asarray([0, 1, 0, -1, 1])
    alone, thrice = summarise(answers, ROWS, LABELS), summarise(np.stack([answers] * 3), ROWS, LABELS)
    assert "accuracy_std" not in alone
    assert (thrice["accuracy_std"], thrice["macro_f1_std"]) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert thrice["accuracy"] == pytest.approx(alone["accuracy"])
    assert thrice["accuracy_interval"] == pytest.approx(alone["accuracy_interval"])
    assert thrice["unparseable"] == alone["unparseable"] == pytest.approx(1 / 5)
    assert thrice["classes"]["no"] == {"rows": 2, "predicted": 6, "correct": 3}


def test_rouge_is_averaged_over_rows_and_runs() -> None:
    scores = np.random.default_rng(0).random((4, 30, 3))
    questions = [Example("p", " r")] * 30
    result = summarise_texts(scores, questions)
    assert result["rouge2"] == pytest.approx(scores[:, :, 1].mean())
    assert result["rougeL_runs"] == pytest.approx(scores[:, :, 2].mean(axis=1))
    low, high = result["rouge1_interval"]
    assert low < result["rouge1"] < high
    assert "rouge1_runs" not in summarise_texts(scores[0], questions)


def test_a_result_survives_json() -> None:
    for result in (summarise(np.zeros((2, 5), int), ROWS, LABELS), summarise_texts(np.ones((5, 3)), ROWS)):
        assert json.loads(json.dumps(result)) == result


def test_a_cell_shows_percent_interval_and_deviation() -> None:
    result = {"accuracy": 0.5, "accuracy_interval": [0.25, 0.75]}
    assert metric_cell(result, "accuracy") == "50.00 [25.00, 75.00]"
    assert metric_cell(result | {"accuracy_std": 0.0123}, "accuracy") == "50.00 ± 1.23 [25.00, 75.00]"


def test_questions_on_one_contract_are_one_group() -> None:
    rows = [Example("p", " yes", keys=(f"contract {number // 2}",)) for number in range(6)]
    alone = [Example("p", " yes")] * 6
    answers, scores = np.asarray([0, 0, 1, 1, 1, 1]), np.repeat([[1.0], [0.0], [0.0]], 2, axis=0) * np.ones(3)
    for result, by_row in (
        (summarise(answers, rows, LABELS), summarise(answers, alone, LABELS)),
        (summarise_texts(scores, rows), summarise_texts(scores, alone)),
    ):
        (metric,) = {"accuracy", "rouge1"} & set(result)
        assert (result["groups"], by_row["groups"]) == (3, 6)
        assert result[f"{metric}_interval"] == [0, 1] != by_row[f"{metric}_interval"]


def test_a_single_group_has_a_value_without_an_interval() -> None:
    rows = [Example("p", " yes", keys=("contract",))] * 3
    result = summarise(np.asarray([0, 0, 1]), rows, LABELS)
    assert result["accuracy_interval"] is None
    assert metric_cell(result, "accuracy") == "66.67"


def test_a_line_break_or_a_bar_in_a_cell_does_not_end_it() -> None:
    lines = markdown_table(["one", "two", "three"], [["a\nb", "c|d", "e\r\n\u2028f"]]).split("\n")
    assert lines == ["| one | two | three |", "|---|---|---|", "| a b | c\\|d | e  f |"]
