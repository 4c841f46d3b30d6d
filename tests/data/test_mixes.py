"""A few lines of YAML say what is learned; how many rows were found, drawn and repeated is reported."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from efx_jax.config import DataConfig
from efx_jax.data.mixes import Mix, Part, find_mix, mix_names, read_mix
from efx_jax.data.prompts import Example
from efx_jax.data.sampling import draw, equal_quotas
from efx_jax.data.tasks import load_data, load_tasks
from efx_jax.errors import InputError, MissingInputError

TEMPLATE = "{case}\\nVerdict: => {verdict}"


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def cases(path: Path, **counts: int) -> str:
    rows = [
        {"case": f"Case {label} {row}.", "verdict": label} for label, count in counts.items() for row in range(count)
    ]
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own_mix(folder: Path, fields: str = "", test: bool = True, **counts: int) -> str:
    train = cases(folder / "train.jsonl", **(counts or {"guilty": 6, "free": 3}))
    held = f"test: {cases(folder / 'test.jsonl', fair=2, free=1)}" if test else ""
    lines = f'tasks:\n  verdicts:\n    train: {train}\n    {held}\n    template: "{TEMPLATE}"\n    {fields}\n'
    return str(write(folder / "mine.yaml", lines))


def refused(folder: Path, content: str, *expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read_mix(write(folder / "bad.yaml", content))
    assert "\n" not in str(caught.value)
    for part in ("bad.yaml", *expected):
        assert part in str(caught.value), str(caught.value)


def test_the_shipped_mixes_are_the_papers() -> None:
    def rows(name: str) -> dict[str, int]:
        mix = find_mix(name)
        assert mix is not None and mix.seed == 1234
        return {part.name: part.rows or sum(count for _, count in part.labels) for part in mix.parts}

    assert rows("health") == {"pubmedqa": 7000, "mednli": 7000, "hqs": 1000}
    assert rows("legal") == {"casehold": 7000, "contract_nli": 6000, "billsum": 1000}
    assert rows("pubmedqa_single") == {"pubmedqa": 14000}
    assert rows("casehold_single") == {"casehold": 15000}
    assert rows("health_open") == {"pubmedqa": 0, "evidence_inference": 0, "hqs": 0}
    assert {"health", "legal_open"} < set(mix_names())
    assert find_mix("hqs") == Mix("hqs", (Part("hqs"),))
    assert find_mix("someone/corpus") is None and find_mix("rows.jsonl") is None


@pytest.mark.filterwarnings("ignore:verdicts")
def test_a_mix_of_the_users_own_is_learned_and_scored(tmp_path: Path) -> None:
    data = load_data(DataConfig(train=own_mix(tmp_path), holdout=0), seed=0)
    assert Counter(example.response for example in data.train) == {" guilty": 6, " free": 2}
    assert data.train[0].prompt.endswith("\nVerdict:")
    (task,) = data.tasks
    assert (task.name, task.labels, len(task.test)) == ("verdicts", (" fair", " free"), 3)
    assert load_tasks([str(tmp_path / "mine.yaml")], DataConfig()) == data.tasks
    assert data.report["test"] == {
        "verdicts": {"rows": 3, "scored": 3, "shortened": 0, "labels": {"fair": 2, "free": 1}}
    }


@pytest.mark.filterwarnings("ignore:verdicts")
def test_a_run_writes_down_its_text_and_how_its_prompts_are_written(tmp_path: Path) -> None:
    mix = Path(own_mix(tmp_path))
    write(tmp_path / "laws.txt", "A law.")
    mix.write_text(mix.read_text() + "text: laws.txt\n")
    report = load_data(DataConfig(train=str(mix), format="alpaca"), seed=0).report
    assert report["text"] == str(tmp_path / "laws.txt")
    prompt, _, _ = TEMPLATE.partition(" =>")
    assert report["prompts"] == {"verdicts": {"instruction": "", "prompt": prompt.replace("\\n", "\n")}}
    rows = [{"text": f"page {number}"} for number in range(9)]
    pages = write(tmp_path / "pages.jsonl", "\n".join(map(json.dumps, rows)))
    report = load_data(DataConfig(train=str(pages)), seed=0).report
    assert (report["text"], report["prompts"]) == ("", {})


def test_a_row_that_is_also_a_test_row_is_not_learned(tmp_path: Path) -> None:
    mix = own_mix(tmp_path)
    with pytest.warns(UserWarning, match="verdicts: 1 training rows are test rows too and are left out.*row 7"):
        data = load_data(DataConfig(train=mix, holdout=0), seed=0)
    assert data.report["train"]["tasks"]["verdicts"]["shared"] == 1
    rows = [{"prompt": "Is it SO?", "response": "yes"}, {"prompt": "Or not?", "response": "no"}]
    train = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    test = write(tmp_path / "b.jsonl", json.dumps({"prompt": "is it  so", "response": "no"}))
    with pytest.warns(UserWarning, match="a.jsonl: 1 training rows"):
        data = load_data(DataConfig(train=str(train), test=(str(test),), holdout=0), seed=0)
    assert [example.prompt for example in data.train] == ["Or not?"]
    assert data.report["train"] == {"rows": 1, "shortened": 0, "shared": 1}
    with pytest.raises(InputError, match="a.jsonl: every training row is a test row too"):
        load_data(DataConfig(train=str(train), test=(str(train),)), seed=0)


@pytest.mark.filterwarnings("ignore:verdicts")
def test_labels_are_drawn_in_equal_shares_and_repeated_where_they_are_short(tmp_path: Path) -> None:
    def learned(fields: str) -> tuple[list[Example], dict[str, Any]]:
        data = load_data(DataConfig(train=own_mix(tmp_path, fields), holdout=0), seed=5)
        return data.train, data.report["train"]["tasks"]["verdicts"]

    train, counts = learned("rows: 9")
    assert Counter(example.response for example in train) == {" free": 5, " guilty": 4}
    assert (counts["asked"], counts["found"], counts["drawn"], counts["repeated"]) == (9, 9, 9, 3)
    assert counts["labels"]["free"] == {"asked": 5, "found": 2, "drawn": 5, "repeated": 3}
    assert len(set(train)) == 6
    train, counts = learned("rows: 9\n    upsample: false")
    assert (counts["asked"], counts["drawn"], counts["repeated"]) == (9, 6, 0)
    train, counts = learned("labels: {guilty: 1}")
    assert [example.response for example in train] == [" guilty"]
    with pytest.raises(InputError, match="verdicts: no training row has the label 'unsure'"):
        learned("labels: {unsure: 1}")


def test_test_rows_that_are_not_scored_are_not_learned_either(tmp_path: Path) -> None:
    mix = own_mix(tmp_path)
    other = str(write(tmp_path / "other.jsonl", json.dumps({"prompt": "Q?", "response": "yes"})))
    with pytest.warns(UserWarning, match="verdicts: 1 training rows"):
        data = load_data(DataConfig(train=mix, test=(other,), holdout=0), seed=0)
    assert ([task.name for task in data.tasks], len(data.train)) == (["other"], 8)
    (tmp_path / "test.jsonl").unlink()
    with pytest.warns(UserWarning, match="not compared with the test rows of verdicts.*test.jsonl"):
        assert len(load_data(DataConfig(train=mix, test=(other,), holdout=0), seed=0).train) == 9


@pytest.mark.filterwarnings("ignore:verdicts")
def test_a_task_whose_rows_are_all_test_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="verdicts: every training row is a test row too"):
        load_data(DataConfig(train=own_mix(tmp_path, "rows: 9", fair=1)), seed=0)


def test_free_text_is_drawn_whole(tmp_path: Path) -> None:
    data = load_data(DataConfig(train=own_mix(tmp_path, "rows: 4\n    new_tokens: 20", test=False), holdout=0), seed=0)
    assert (len(data.train), data.tasks) == (4, ())
    assert "labels" not in data.report["train"]["tasks"]["verdicts"]
    mix = own_mix(tmp_path, "new_tokens: 20")
    (task,) = load_tasks([mix], DataConfig())
    assert (task.labels, task.new_tokens) == ((), 20)


def test_the_same_seed_draws_the_same_rows() -> None:
    examples = [Example(str(row), f" {row % 3}") for row in range(90)]
    drawn, counts = draw(examples, equal_quotas(31, ["0", "1", "2"]), True, 1234, "x")
    assert drawn == draw(examples, equal_quotas(31, ["0", "1", "2"]), True, 1234, "x")[0]
    assert drawn != draw(examples, equal_quotas(31, ["0", "1", "2"]), True, 1235, "x")[0]
    assert [counts["labels"][label]["drawn"] for label in "012"] == [11, 10, 10]
    assert len(set(drawn)) == 31


def test_what_is_wrong_in_a_mix_is_named(tmp_path: Path) -> None:
    refused(tmp_path, "task:\n  hqs: {}", "task is no key of a mix", "nearest is tasks")
    refused(tmp_path, "tasks:\n  hqs: {row: 3}", "tasks.hqs: row is no key", "nearest is rows")
    refused(tmp_path, "tasks:\n  hsq: {rows: 3}", "tasks.hsq: no task of that name", "nearest is hqs")
    refused(tmp_path, "tasks:\n  hqs: {rows: many}", "tasks.hqs.rows must be an integer", "'many'")
    refused(tmp_path, "tasks:\n  hqs: {rows: -1}", "[0, 100,000,000]", "-1")
    refused(
        tmp_path, "tasks:\n  hqs: {split: artificial}", "tasks.hqs.split", "train, validation, test", "'artificial'"
    )
    refused(tmp_path, "tasks:\n  hqs: {template: x}", "tasks.hqs", "rows of your own")
    refused(tmp_path, "tasks:\n  mine: {train: x, split: test}", "tasks.mine", "the paper's tasks")
    refused(tmp_path, "tasks:\n  hqs: 3", "tasks.hqs", "rows: 1000")
    refused(tmp_path, "tasks:\n  pubmedqa: {rows: 3, labels: {yes: 3}}", "either rows or labels")
    refused(tmp_path, "tasks:\n  pubmedqa: {labels: {yes: 0}}", "1 to 100,000,000 rows per label")
    refused(tmp_path, "tasks:\n  hqs: {rows: 1000000000}", "tasks.hqs", "[0, 100,000,000]")
    refused(tmp_path, "tasks:\n  pubmedqa: {labels: {yes: 1000000000}}", "tasks.pubmedqa.labels", "100,000,000")
    refused(tmp_path, "tasks:\n  hqs: {}\n  billsum: {}\n  hqs: {rows: 3}", "bad.yaml:4: hqs is given twice")
    refused(tmp_path, "seed: -1\ntasks:\n  hqs: {}", "seed must be at least 0, found -1")
    refused(tmp_path, "tasks: {}", "a task or more")
    refused(tmp_path, "seed: 1", "a task or more")
    with pytest.raises(InputError, match="missing.yaml cannot be read"):
        find_mix(str(tmp_path / "missing.yaml"))
    with pytest.raises(InputError, match="helth: no task, mix or file of that name; the nearest is health"):
        load_data(DataConfig(train="helth"), seed=0)


def test_questions_on_one_document_are_held_out_together(tmp_path: Path) -> None:
    pairs = [{"sentence1": f"Contract {row // 4}.", "sentence2": f"So {row}.", "label": "neutral"} for row in range(40)]
    (tmp_path / "contract_nli").mkdir()
    write(tmp_path / "contract_nli/train.jsonl", "\n".join(map(json.dumps, pairs)))
    write(tmp_path / "contract_nli/test.jsonl", json.dumps(pairs[0]))
    with pytest.warns(UserWarning, match="contract_nli: 4 training rows"):
        data = load_data(DataConfig(train="contract_nli", root=str(tmp_path), holdout=0.25), seed=0)
    documents = {example.keys for example in data.train}
    assert (len(data.train), len(documents), len(data.text)) == (24, 6, 12)
    assert len({text.split("\n")[0] for text in data.text}) == 3


def test_files_are_found_beside_their_mix_then_here_then_below_the_root(tmp_path: Path, monkeypatch) -> None:
    mixes, here, root = (tmp_path / name for name in ("mixes", "here", "root"))
    for folder, names in ((mixes, ("train",)), (here, ("train", "test")), (root, ("train", "test", "text"))):
        folder.mkdir()
        for name in names:
            write(folder / f"{name}.jsonl", json.dumps({"prompt": f"{folder.name} {name}", "response": " a"}))
    lines = "tasks:\n  mine: {train: train.jsonl, test: test.jsonl}\ntext: text.jsonl\n"
    mix = write(mixes / "mine.yaml", lines)
    monkeypatch.chdir(here)
    data = load_data(DataConfig(train=str(mix), root=str(root)), seed=0)
    assert [example.prompt for example in (*data.train, *data.tasks[0].test)] == ["mixes train", "here test"]
    assert data.text == ["root text a"]


def test_what_is_wrong_with_a_task_of_a_mix_names_both(tmp_path: Path) -> None:
    lines = "tasks:\n  mine: {train: TRAIN, test: TEST, template: '{case} => {verdict}'}\n"
    good, bad = cases(tmp_path / "good.jsonl", free=2), str(write(tmp_path / "bad.jsonl", '{"case": "x"}'))
    for train, test in ((good, bad), (bad, good)):
        mix = write(tmp_path / "ward.yaml", lines.replace("TRAIN", train).replace("TEST", test))
        with pytest.raises(InputError, match="^ward: tasks.mine: .*bad.jsonl row 1: no column 'verdict'"):
            load_data(DataConfig(train=str(mix)), seed=0)
    missing = write(tmp_path / "ward.yaml", lines.replace("TRAIN", "nowhere.jsonl").replace("TEST", good))
    with pytest.raises(MissingInputError, match="^ward: tasks.mine: nowhere.jsonl: no such file"):
        load_data(DataConfig(train=str(missing)), seed=0)
