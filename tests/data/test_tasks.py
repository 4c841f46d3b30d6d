"""A task is built from files or built in, and held-out rows stay held out."""

import dataclasses
import json
import pathlib

import pytest

from efx_jax.config import DataConfig
from efx_jax.data.prompts import Example
from efx_jax.data.sources import hold_out
from efx_jax.data.tasks import load_data, load_tasks, load_text
from efx_jax.errors import InputError


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def train(tmp_path: pathlib.Path) -> str:
    return write(tmp_path / "train.jsonl", [{"q": f"question {i}", "a": f"answer {i}"} for i in range(40)])


TEMPLATE = "{q}? => {a}"


def test_a_share_of_the_rows_is_held_out_for_perplexity(train: str) -> None:
    task = load_data(DataConfig(train=train, template=TEMPLATE, holdout=0.1), seed=0)
    assert (len(task.train), len(task.text), task.tasks) == (36, 4, ())
    assert not {example.prompt + example.response for example in task.train} & set(task.text)
    assert load_data(DataConfig(train=train, template=TEMPLATE, holdout=0.1), seed=0) == task
    assert load_data(DataConfig(train=train, template=TEMPLATE, holdout=0.1), seed=1) != task
    assert load_data(DataConfig(train=train, template=TEMPLATE, holdout=0.0), seed=0).text == []


def test_given_text_leaves_all_rows_for_training(train: str, tmp_path: pathlib.Path) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": "some text"}])
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p:", "response": " r"}])
    task = load_data(DataConfig(train=rows, text=text), seed=0)
    assert (task.train, task.text) == ([Example("p:", " r")], ["some text"])
    assert load_text(rows, DataConfig()) == ["p: r"]


def test_labels_are_the_distinct_responses_of_the_test_rows(train: str, tmp_path: pathlib.Path) -> None:
    rows = [{"q": str(i), "a": ("yes", "no", "maybe")[i % 3]} for i in range(9)]
    test = write(tmp_path / "test.jsonl", rows)
    (task,) = load_tasks([test], DataConfig(template=TEMPLATE))
    assert task.name == "test"
    assert task.labels == (" maybe", " no", " yes")
    assert task.test[0] == Example("0?", " yes")
    (framed,) = load_data(DataConfig(train=train, test=(test,), template=TEMPLATE, format="alpaca"), seed=0).tasks
    assert framed.labels == ("maybe", "no", "yes")
    assert {example.response for example in framed.test} == set(framed.labels)


def test_test_rows_that_cannot_be_chosen_from_are_refused(train: str, tmp_path: pathlib.Path) -> None:
    free = write(tmp_path / "free.jsonl", [{"prompt": "p", "response": str(i)} for i in range(101)])
    text = write(tmp_path / "text.jsonl", [{"text": "x"}])
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p", "response": "r"}] * 2)
    blanks = write(tmp_path / "blanks.jsonl", [{"prompt": "p", "response": r} for r in ("yes", "no", "yes ")])
    with pytest.raises(InputError, match="blanks.jsonl: responses 'yes' and 'yes ' differ in blanks or in the coding"):
        load_tasks([blanks], DataConfig())
    with pytest.raises(InputError, match="101 distinct responses"):
        load_data(DataConfig(train=rows, test=(free,)), seed=0)
    with pytest.raises(InputError, match="row 1: a test row needs a prompt"):
        load_data(DataConfig(train=rows, test=(text,)), seed=0)
    with pytest.raises(InputError, match="found rows twice"):
        load_tasks([rows, rows], DataConfig())
    with pytest.raises(InputError, match=r"data\.holdout"):
        load_data(DataConfig(train=rows, holdout=1.0), seed=0)


def test_the_environment_names_the_root(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFX_DATA", str(pathlib.Path(train).parent))
    assert len(load_data(DataConfig(train="train.jsonl", template=TEMPLATE, holdout=0), seed=0).train) == 40


def test_icd10_is_scored_on_as_many_rows_of_every_chapter() -> None:
    pytest.importorskip("simple_icd_10_cm")
    [task] = load_tasks(["icd10"], DataConfig(), rows=42)
    assert sorted(row.response for row in task.test) == sorted(task.labels * 2)


def test_icd10_mixes_questions_and_code_lines() -> None:
    pytest.importorskip("simple_icd_10_cm")
    data = load_data(DataConfig(), seed=0)
    (task,) = data.tasks
    assert (task.name, len(task.labels)) == ("icd10", 21)
    assert {bool(example.prompt) for example in data.train} == {True, False}
    assert all(example.response in task.labels for example in task.test)
    assert len(data.text) > 100
    assert load_text("icd10", DataConfig()) == data.text


def test_fewer_test_rows_are_a_fixed_sample_whatever_the_seed(train: str, tmp_path: pathlib.Path) -> None:
    rows = [{"q": f"{row}", "a": "no" if row < 50 else "yes"} for row in range(100)]
    config = DataConfig(train=train, test=(write(tmp_path / "sorted.jsonl", rows),), template=TEMPLATE)
    (task,) = load_tasks(config.test, config, rows=20)
    assert len(task.test) == 20 and {row.response for row in task.test} == {" no", " yes"}
    assert [load_data(config, seed, rows=20).tasks for seed in (0, 1)] == [(task,), (task,)]


@pytest.mark.parametrize("source", ["pubmedqa", "rows.jsonl", "owner/name"])
def test_a_root_that_is_no_folder_is_refused_by_its_name(source: str, tmp_path: pathlib.Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"^data.root: no folder /no/such/place;"):
        load_data(DataConfig(train=source, root="/no/such/place"), seed=0)
    monkeypatch.setenv("EFX_DATA", str(tmp_path / "typo"))
    with pytest.raises(InputError, match=r"^EFX_DATA: no folder .*typo;"):
        load_tasks([source], DataConfig())


def test_a_small_file_of_free_text_is_not_taken_for_labels(train: str, tmp_path: pathlib.Path) -> None:
    letters = write(tmp_path / "letters.jsonl", [{"q": f"note {i}", "a": f"Dear {i % 12},"} for i in range(14)])
    config = DataConfig(template=TEMPLATE)
    with pytest.raises(InputError, match=r"12 distinct responses in 14 rows; .* set data.new_tokens"):
        load_tasks([letters], config)
    (task,) = load_tasks([letters], dataclasses.replace(config, new_tokens=64))
    assert (task.labels, task.new_tokens, len(task.test)) == ((), 64, 14)
    few = write(tmp_path / "few.jsonl", [{"q": f"note {i}", "a": f"{i}"} for i in range(10)])
    many = write(tmp_path / "many.jsonl", [{"q": f"note {i}", "a": f"{i % 21}"} for i in range(42)])
    assert [len(task.labels) for task in load_tasks([few, many], config)] == [10, 21]


def test_rows_that_share_any_key_are_held_out_together() -> None:
    rows = [Example(f"p{n}", "r", keys=(f"text {n}", f"answer {n // 2}")) for n in range(40)]
    kept, held = hold_out(rows, 0.2, seed=0)
    assert len(held) == 8 and len(kept) == 32
    assert not {row.keys[1] for row in kept} & {row.keys[1] for row in held}
