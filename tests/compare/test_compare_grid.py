"""Two methods on two schedules and the dense reference, with two seeds: trained once, measured, tabled."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efx_jax
from efx_jax.compare import work
from efx_jax.config_io import from_yaml
from efx_jax.evaluation.relative import read_evaluation, relative

pytestmark = pytest.mark.slow

Write = Callable[..., Path]
Launch = Callable[..., int]
Read = Callable[[Path], Any]
TASK = "likelihood.test"


@pytest.fixture(scope="module")
def file(write: Write) -> Path:
    return write("small", "seeds: [0, 1]")


@pytest.fixture(scope="module")
def done(file: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compared")
    assert launch(file, output) == 0
    return output


def evaluation(run: Path, name: str) -> Path:
    found = [path for path in (run / "evaluations").glob(f"{name}-*") if path.is_dir()]
    assert len(found) == 1
    return found[0]


def test_every_cell_is_a_run_with_its_settings(done: Path, read: Read) -> None:
    entries = read(done / "small" / "runs.json")
    named = {(entry["method"], entry["schedule"], entry["seed"]) for entry in entries}
    assert named == {
        (method, schedule, seed)
        for seed in (0, 1)
        for method, schedule in (
            ("dense", ""),
            *((method, schedule) for method in ("wanda", "magnitude") for schedule in ("post_hoc", "prune_first")),
        )
    }
    assert len({entry["run"] for entry in entries}) == len(entries) == 10
    assert {entry["status"] for entry in entries} == {"done"}
    for entry in entries:
        config = from_yaml((done / "runs" / entry["run"] / "config.yaml").read_text())
        assert config.seed == entry["seed"]
        assert config.prune.sparsity == entry["asked_sparsity"] == (0 if entry["method"] == "dense" else 0.5)


def test_what_dense_lora_has_learned_before_the_event_is_not_learned_again(done: Path, read: Read) -> None:
    """Its lines stand in the run's log, with its speed."""
    lines = {}
    for entry in read(done / "small" / "runs.json"):
        lines[entry["method"], entry["schedule"], entry["seed"]] = (
            done / "runs" / entry["run"] / "metrics.jsonl"
        ).read_text()
    for seed in (0, 1):
        for method in ("wanda", "magnitude"):
            assert lines[method, "post_hoc", seed] == lines["dense", "", seed] != ""
            assert lines[method, "prune_first", seed] != lines["dense", "", seed]


def test_a_cells_numbers_are_those_of_its_run_and_its_evaluations(done: Path, read: Read) -> None:
    for entry in read(done / "small" / "runs.json"):
        run, metrics = done / "runs" / entry["run"], entry["metrics"]
        summary = read(run / "summary.json")
        assert metrics["train_seconds"] == summary["seconds"]["train"]
        assert metrics["event_seconds"] == summary["seconds"].get("prune", 0)
        assert (metrics["tokens"], metrics["peak_memory_mib"]) == (summary["tokens"], summary["peak_memory_mib"])
        text, task = (read(evaluation(run, name) / "summary.json") for name in ("general", "likelihood"))
        assert metrics["perplexity.general"] == text["perplexity"]["value"]
        low, high = entry["intervals"]["perplexity.general"]
        assert [low, high] == text["perplexity"]["interval"] and low < metrics["perplexity.general"] < high
        for name in ("accuracy", "macro_f1"):
            assert metrics[f"{TASK}.{name}"] == task["tasks"]["test"][name]
            assert entry["intervals"][f"{TASK}.{name}"] == task["tasks"]["test"][f"{name}_interval"]
        layers = efx_jax.load_pretrained(run / "export", dtype=None)[0]["layers"]
        weights = [np.asarray(leaf) for name, leaf in layers.items() if name.endswith("_proj")]
        zeros = sum((weight == 0).sum() for weight in weights) / sum(weight.size for weight in weights)
        assert metrics["sparsity"] == pytest.approx(zeros) == pytest.approx(entry["asked_sparsity"])


def test_relative_is_to_the_dense_run_of_the_same_seed(done: Path, read: Read) -> None:
    entries = read(done / "small" / "runs.json")
    dense = {entry["seed"]: done / "runs" / entry["run"] for entry in entries if entry["method"] == "dense"}
    for entry in entries:
        found = read_evaluation(evaluation(done / "runs" / entry["run"], "likelihood"))
        expected = relative(*found, *read_evaluation(evaluation(dense[entry["seed"]], "likelihood")))
        assert entry["metrics"]["likelihood.relative"] == pytest.approx(expected["value"])
        assert entry["intervals"].get("likelihood.relative") == expected["interval"]


def test_a_row_is_the_mean_over_its_seeds(done: Path, read: Read) -> None:
    entries, rows = read(done / "small" / "runs.json"), read(done / "small" / "table.json")
    assert len(rows) == 5
    with (done / "small" / "table.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    for row, line in zip(rows, lines, strict=True):
        own = [each for each in entries if (each["method"], each["schedule"]) == (row["method"], row["schedule"])]
        assert row["seeds"] == [0, 1] and line["seeds"] == "2"
        for key, found in row["metrics"].items():
            values = [each["metrics"][key] for each in own]
            assert found["values"] == values
            assert found["mean"] == pytest.approx(np.mean(values)) == pytest.approx(float(line[key]))
            assert found["std"] == pytest.approx(np.std(values, ddof=1)) == pytest.approx(float(line[f"{key}_std"]))


def test_perplexities_stand_beside_that_of_dense_on_the_same_windows(done: Path, read: Read) -> None:
    """From the windows that the evaluations have written: nothing here is made up."""
    for row in read(done / "small" / "table.json"):
        ratios, mean = row["ratios"], row["metrics"]["perplexity.general"]["mean"]
        assert mean > 0 and set(ratios) == (
            {"general over dense", "general over the best other"} if row["schedule"] else set()
        )
        for ratio in ratios.values():
            low, high = ratio["interval"]
            assert low < ratio["value"] < high
    assert "## Side by side" in (done / "small" / "table.md").read_text()


def test_the_markdown_has_a_row_for_each(done: Path, read: Read) -> None:
    text = (done / "small" / "table.md").read_text()
    row = next(row for row in read(done / "small" / "table.json") if row["schedule"] == "prune_first")
    ppl, accuracy = row["metrics"]["perplexity.general"], row["metrics"][f"{TASK}.accuracy"]
    expected = f"| wanda | prune_first | 50 | 50.00 ± 0.00 | {ppl['mean']:.2f} ± {ppl['std']:.2f} | "
    assert expected + f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f} | " in text
    assert "| general perplexity | test accuracy % | test macro-F1 % | Rel. % |" in text
    assert "| training s | events s | peak MiB | tokens |" in text
    assert text.count("| dense |  | 0 |") == 2


def test_pruned_without_training_a_cell_costs_its_event_alone(
    done: Path, write: Write, launch: Launch, read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    more = """
    methods: {dense: {prune: {sparsity: 0}}, bare: {train: {epochs: 0, steps: 0}}}
    runs: {dense: [], bare: [prune_first]}
    figures: {ppl: {x: method, y: perplexity.general, kind: bars}}
    """
    file = write("bare", more)
    assert launch(file, done, "--dry-run") == 0
    assert "prune    bare/prune_first, seed 0: no updates; general, likelihood\n" in capsys.readouterr().out
    assert launch(file, done) == 0
    _, bare = read(done / "bare" / "runs.json")
    assert (bare["status"], bare["metrics"]["tokens"], bare["metrics"]["train_seconds"]) == ("done", 0, 0)
    assert bare["metrics"]["sparsity"] == pytest.approx(0.5) and bare["metrics"]["event_seconds"] > 0
    with (done / "bare" / "figures" / "ppl.csv").open() as stream:
        shown = {line["label"]: float(line["y"]) for line in csv.DictReader(stream)}
    assert shown["prune_first"] == bare["metrics"]["perplexity.general"] and set(shown) == {"prune_first", "dense"}
    assert "![ppl](figures/ppl.png)" in (done / "bare" / "table.md").read_text()


def test_a_second_call_does_nothing(done: Path, file: Path, launch: Launch, calls: list[str]) -> None:
    before = (done / "small" / "table.json").read_text()
    assert launch(file, done) == 0
    assert calls == []
    assert (done / "small" / "table.json").read_text() == before


def test_another_comparison_takes_the_runs_that_it_shares(
    done: Path, write: Write, launch: Launch, calls: list[str], read: Read
) -> None:
    """Dense LoRA is one run at every sparsity; a value that is asked again is there."""
    more = "axes: {prune.sparsity: [0.25, 0.5]}\nruns: {dense: [], wanda: [post_hoc]}"
    assert launch(write("sparsities", more), done) == 0
    assert calls == ["train_one", "evaluation", "evaluation"]
    rows = read(done / "sparsities" / "table.json")
    assert [(row["method"], row["axes"]["prune.sparsity"]) for row in rows] == [
        ("dense", None),
        ("wanda", 0.25),
        ("wanda", 0.5),
    ]
    assert rows[1]["metrics"]["sparsity"]["mean"] == pytest.approx(0.25, abs=0.02)


def test_what_is_measured_anew_is_not_trained_anew(done: Path, write: Write, launch: Launch, calls: list[str]) -> None:
    more = "runs: {dense: []}\nevaluate: {texts: {other: " + str(write("any").parent / "text.jsonl") + "}, window: 8}"
    assert launch(write("texts", more), done) == 0
    assert calls == ["evaluation"]


def test_work_that_was_cut_off_goes_on(
    done: Path, write: Write, launch: Launch, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Ctrl-C in the second evaluation; what was finished before is not done again."""
    file = write("cut", "seeds: [5]")
    whole = work.call

    def cut(module: str, arguments: Sequence[str], log: Path) -> int:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(module, arguments, log)

    with monkeypatch.context() as patch:
        patch.setattr(work, "call", cut)
        assert launch(file, done, "--only", "dense") == 130
    assert calls == ["train_one", "evaluation"]
    assert launch(file, done, "--only", "dense") == 0
    assert calls == ["train_one", "evaluation", "evaluation"]


def test_a_failing_cell_is_told_and_the_others_go_on(
    done: Path, write: Write, launch: Launch, monkeypatch: pytest.MonkeyPatch, read: Read, capsys: Any
) -> None:
    """The second call tries it again."""
    more = "runs: {wanda: [half], dense: []}\nschedules: {half: {prune: {schedule: fractions, fractions: [0.5]}}}"
    file = write("failing", more)
    whole = work.call

    def fail(module: str, arguments: Sequence[str], log: Path) -> int:
        if "wanda" in log.name:
            log.write_text("loading\nerror: the model has gone\n")
            return 2
        return whole(module, arguments, log)

    with monkeypatch.context() as patch:
        patch.setattr(work, "call", fail)
        assert launch(file, done) == 1
    wanda, dense = read(done / "failing" / "runs.json")
    assert (dense["status"], wanda["status"], wanda["metrics"]) == ("done", "failed", {})
    assert wanda["reason"].startswith("the model has gone; see ")
    expected = "- failed: wanda/half, seed 0: the model has gone; see "
    assert expected in (done / "failing" / "table.md").read_text()
    assert "wanda/half, seed 0: failed: the model has gone; see " in capsys.readouterr().err
    assert launch(file, done) == 0
    assert {entry["status"] for entry in read(done / "failing" / "runs.json")} == {"done"}


def test_a_text_that_cannot_be_read_keeps_no_task_waiting(
    done: Path, write: Write, launch: Launch, read: Read, calls: list[str]
) -> None:
    more = "runs: {dense: []}\nevaluate: {tasks: [TEST], texts: {gone: GONE, lost: LOST}, window: 16}"
    folder = write("any").parent
    more = more.replace("TEST", str(folder / "test.jsonl")).replace("GONE", str(folder / "gone.jsonl"))
    assert launch(write("unread", more.replace("LOST", str(folder / "lost.jsonl"))), done) == 1
    # The task's answers are those of the first comparison.
    assert calls == ["evaluation", "evaluation"]
    (dense,) = read(done / "unread" / "runs.json")
    assert dense["status"] == "failed" and f"{TASK}.accuracy" in dense["metrics"]
    gone, lost = dense["reason"].split("; lost: ")
    assert gone.startswith("gone: ") and "gone.jsonl" in gone and "lost.jsonl" in lost


def test_an_impossible_pair_is_told_and_the_others_go_on(done: Path, write: Write, launch: Launch, read: Read) -> None:
    more = """
    methods: {blind: {prune: {mask_forward: dense}}, dense: {prune: {sparsity: 0}}}
    runs: {blind: [prune_first], dense: []}
    """
    assert launch(write("impossible", more), done) == 0
    blind, dense = read(done / "impossible" / "runs.json")
    assert (blind["status"], dense["status"]) == ("refused", "done")
    assert blind["reason"].startswith(
        "prune.mask_forward must be exact, ste or frozen with the last event before the end"
    )
    assert (
        "- impossible: blind/prune_first, seed 0: prune.mask_forward" in (done / "impossible" / "table.md").read_text()
    )
    assert not (done / "runs" / blind["run"]).exists()


def test_a_dry_run_says_what_is_left(
    done: Path, write: Write, launch: Launch, calls: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = """
    seeds: [1, 2]
    methods: {dense: {prune: {sparsity: 0}}, wanda: {}, again: {}, wide: {prune: {group: "2:16"}}}
    runs: {dense: [], wanda: [post_hoc], again: [post_hoc], wide: [post_hoc]}
    """
    file = write("planned", more)
    assert launch(file, done, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = json.loads(next((done / "runs").glob("train-dense-seed1-*/summary.json")).read_text())["tokens"]
    assert lines[0] == f"done     dense, seed 1: 3 steps, {tokens} tokens"
    assert lines[1] == f"done     wanda/post_hoc, seed 1: 3 steps, {tokens} tokens"
    assert lines[3].startswith("refused  wide/post_hoc, seed 1: prune.sparsity must be 1 - 2/16 = 0.875")
    assert lines[4].startswith("train    dense, seed 2: 3 steps, about ")
    assert lines[4].endswith("; general, likelihood")
    assert lines[6] == "shared   again/post_hoc, seed 2: the run of wanda/post_hoc, seed 2"
    assert lines[-1] == "8 cells: 3 done, 2 refused, 2 train, 1 shared"
    assert calls == []
    assert launch(file, tmp_path / "new", "--dry-run", "--only", "dense") == 0
    assert not (tmp_path / "new").exists()
