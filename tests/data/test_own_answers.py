"""What looks like a slip in a user's own answers is named, since it counts as an answer."""

import json
import math
import warnings
from pathlib import Path

import pytest

from efx_jax.config import DataConfig
from efx_jax.data.own_answers import distinct_answers, warn_of_slips, warn_of_unasked
from efx_jax.data.prompts import Example, examples_from_rows
from efx_jax.data.tasks import load_data
from efx_jax.errors import InputError


def answered(*answers: str) -> list[Example]:
    return [Example("p", f" {answer}", f"own.csv row {row}") for row, answer in enumerate(answers, start=1)]


def test_an_answer_of_one_row_that_is_spelled_much_as_a_common_one_is_named_with_its_row() -> None:
    with pytest.warns(
        UserWarning,
        match=r"own.csv row 3: the answer 'hgih' \(1 of 4 rows\) counts as a different answer from 'high' \(2 r",
    ):
        assert distinct_answers(answered("high", "high", "hgih", "low"), "own.csv") == (" hgih", " high", " low")


def test_answers_that_differ_in_case_are_named_once() -> None:
    with pytest.warns(UserWarning, match="own.csv row 2: the answer 'yes'") as caught:
        warn_of_slips(answered("Yes", "yes", "Yes", "no"))
    assert len(caught) == 1


def test_a_test_file_with_a_single_answer_is_named() -> None:
    with pytest.warns(UserWarning, match="every test row has the answer ' yes'"):
        distinct_answers(answered("yes", "yes"), "own.csv")


def test_ordinary_answers_pass_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distinct_answers(answered("1", "2", "10", "2", "contradiction"), "own.csv")
        warn_of_unasked(answered("low", "high"), (" high", " low", " none"), "triage")
        warn_of_unasked(answered("other", "words"), (" high", " low"), "triage")


def test_training_answers_that_all_have_another_case_are_named() -> None:
    with pytest.warns(UserWarning, match="triage: 2 of 2 training rows have an answer .*own.csv row 1, 'Urgent'"):
        warn_of_unasked(answered("Urgent", "Routine"), (" routine", " urgent"), "triage")
    with pytest.warns(UserWarning, match="triage: 2 of 2 training rows"):
        warn_of_unasked(answered("now", "later"), (" routine", " urgent"), "triage", is_own=True)


@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_training_answers_with_other_blanks_are_named_where_no_frame_drops_them(style: str, tmp_path: Path) -> None:
    for name, answer in {"train": " high", "test": "high"}.items():
        rows = [{"prompt": f"{name} note", "response": answer}, {"prompt": f"{name} other", "response": "low"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text("tasks: {test: {train: train.jsonl, test: test.jsonl}}")
    for train, test in (("train.jsonl", ("test.jsonl",)), ("mine.yaml", ())):
        names = tuple(str(tmp_path / name) for name in test)
        config = DataConfig(train=str(tmp_path / train), test=names, format=style)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_data(config, seed=0)
        said = [str(warning.message) for warning in caught if "other blanks" in str(warning.message)]
        assert len(said) == (style == "plain")
        assert all("test: 1 of 2 training rows" in line and "' high', expected 'high'" in line for line in said)


def test_two_codings_of_one_accent_are_refused() -> None:
    with pytest.raises(InputError, match="own.csv: responses .* differ in blanks or in the coding of accents alone"):
        distinct_answers(answered("caf\u00e9", "cafe\u0301", "bar"), "own.csv")


def test_a_training_answer_that_no_test_row_has_is_named_with_its_row(tmp_path: Path) -> None:
    for name, answers in {"train": ("high", "low", "hgih"), "test": ("high", "low")}.items():
        rows = [f"{name} note {row},{answer}" for row, answer in enumerate(answers)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt,response", *rows]))
    config = DataConfig(train=str(tmp_path / "train.csv"), test=(str(tmp_path / "test.csv"),))
    with pytest.warns(UserWarning, match="test: 1 of 3 training rows have an answer .*train.csv row 3, 'hgih'"):
        load_data(config, seed=0)
    (tmp_path / "mine.yaml").write_text("tasks: {triage: {train: train.csv, test: test.csv}}")
    with pytest.warns(UserWarning, match="triage: 1 of 3 training rows have an answer .*train.csv row 3, 'hgih'"):
        load_data(DataConfig(train=str(tmp_path / "mine.yaml")), seed=0)


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "column 'a' is empty"), (b"yes", "column 'a' holds a bytes; expected text")]
)
def test_a_missing_value_is_no_answer(value: object, message: str) -> None:
    with pytest.raises(InputError, match=f"own.parquet row 1: {message}"):
        examples_from_rows([{"q": "p", "a": value}], "own.parquet", "{q} => {a}")


def test_an_empty_column_is_no_answer_whatever_stands_around_it() -> None:
    rows = [{"q": "p", "a": "high"}, {"q": "p", "a": " "}]
    with pytest.raises(InputError, match="own.csv row 2: column 'a' is empty"):
        examples_from_rows(rows, "own.csv", "{q} => Urgency: {a}")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "no column 'response'"),
        ({"prompt": "a", "respons": "b"}, "no column 'response'; the nearest is respons"),
        ({"response": "b"}, "no column 'prompt'"),
        ({"other": "b"}, "no column 'text'"),
    ],
)
def test_the_column_that_is_missing_is_named(row: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        examples_from_rows([row], "own.jsonl")
