"""A few answers of every model are kept: the first rows of every task, in all as many as asked for."""

import json
from pathlib import Path

import pytest

from efx_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from efx_jax.data.prompts import Example, plain_text
from efx_jax.data.tasks import Data, Task, load_data
from efx_jax.training.prepare import Prepared
from efx_jax.training.samples import kept_answers, rows_shown, tasks_shown, write_samples, written_answers
from efx_jax.weights.hf import load_pretrained, load_tokenizer
from tests.quick import quick_compilation
from tests.tiny import ROWS, write_rows


def task(name: str, rows: int) -> Task:
    return Task(name, [Example(f"prompt {row}", " yes", f"file row {row}") for row in range(rows)], (" yes", " no"))


@pytest.mark.parametrize(
    ("count", "sizes", "shown"),
    [
        (20, (100, 100, 100), (7, 7, 6)),
        (20, (100, 3, 100), (9, 3, 8)),
        (20, (2, 3), (2, 3)),
        (1, (5, 5), (1, 0)),
        (0, (5,), (0,)),
        (20, (), ()),
    ],
)
def test_rows_are_spread_over_the_tasks(count: int, sizes: tuple[int, ...], shown: tuple[int, ...]) -> None:
    tasks = [task(str(number), size) for number, size in enumerate(sizes)]
    assert tuple(rows_shown(tasks, count).values()) == shown


def test_kept_are_the_answers_of_the_first_run_with_what_tells_how_good_they_are() -> None:
    common = {"task": "a", "origin": "", "prompt": "p", "gold": "yes", "group": 0}
    records = [
        {"run": 0, "row": 0, "answer": "no", "prediction": "no", "scores": {"yes": -2.0, "no": -0.5, "maybe": -1.25}},
        {"run": 0, "row": 1, "answer": "well", "prediction": None},
        {"run": 0, "row": 2, "answer": "text", "rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375},
        {"run": 0, "row": 3, "answer": "beyond"},
        {"run": 1, "row": 0, "answer": "other run"},
    ]
    assert kept_answers([common | record for record in records], 3) == [
        {"answer": "no", "prediction": "no", "margin": 0.75},
        {"answer": "well", "prediction": None},
        {"answer": "text", "rougeL": 0.375},
    ]


def test_a_line_holds_the_row_and_every_models_answer(tmp_path: Path) -> None:
    answers = {
        model: {"samples": {"a": [{"answer": f"{model} {row}"} for row in range(2)]}} for model in ("base", "expert")
    }
    write_samples(tmp_path / "samples.jsonl", [task("a", 5), task("b", 5)], answers | {"other": {}})
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "task": "a",
        "row": 1,
        "origin": "file row 1",
        "prompt": "prompt 1",
        "gold": "yes",
        "answers": {"base": {"answer": "base 1"}, "expert": {"answer": "expert 1"}},
    }
    assert len(lines) == 2


def test_without_answers_there_is_no_file(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.jsonl", [task("a", 5)], {"base": {"perplexity": {"value": 3.0}}})
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_tasks_writes_behind_the_held_out_prompts_that_have_room(
    tmp_path: Path, tiny_folder: Path
) -> None:
    rows = [("fever " * 60, "lung"), *ROWS * 4]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = Config(
        model=ModelConfig(compute_dtype="float32"),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), holdout=0.9, max_length=16),
        eval=EvalConfig(samples=2, batch_size=2),
    )
    data = load_data(config.data, seed=0)
    assert plain_text(data.held_out) == data.text and len(data.text) > 10
    params, spec = load_pretrained(tiny_folder)
    prepared = Prepared(params, spec, load_tokenizer(tiny_folder), data, [], [], ())
    (shown,) = tasks_shown(config, prepared)
    short = [example for example in data.held_out if len(example.prompt.split()) < 16]
    assert shown.test == short[:2] and len(short) < len(data.held_out)
    with quick_compilation():
        answers = written_answers(config, prepared, params, None, None)
    assert list(answers) == [shown.name]
    assert [len(kept["answer"].split()) <= 48 for kept in answers[shown.name]] == [True, True]
    scored = Prepared(params, spec, None, Data([], (task("a", 2),), [], {}, data.held_out), [], [], ())
    assert written_answers(config, scored, params, None, None) == {}
    assert [shown.name for shown in tasks_shown(config, scored)] == ["a"]
