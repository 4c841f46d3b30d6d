"""A few answers of every model are kept: the first rows of every task, in all as many as asked for."""

import json
from pathlib import Path

import pytest

from efx_jax.data.prompts import Example
from efx_jax.data.tasks import Task
from efx_jax.training.samples import kept_answers, rows_shown, write_samples


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
