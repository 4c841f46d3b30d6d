"""report.html is one well-formed page that loads nothing, lets no text act, and says what the run has measured."""

import dataclasses
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from efx_jax.analysis import report, report_curves
from efx_jax.analysis.html import Html
from efx_jax.analysis.record import read_record
from efx_jax.analysis.svg import Chart
from efx_jax.config import Config, DataConfig, DistillConfig, ModelConfig, PruneConfig
from tests.analysis.reported import EVIL, leave_run, metrics, samples, summary

CONFIG = Config(
    model=ModelConfig(path="/home/somebody/<b>base</b>"),
    data=DataConfig(train="pubmedqa", template="<i>{question}</i>"),
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and the words below each; complains of tags that do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert self.open == [], "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words.setdefault(tag, []).append(data)

    def said(self, tag: str = "body") -> str:
        return " ".join(" ".join(self.words.get(tag, [])).split())

    def all(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report.write_report(leave_run(tmp_path_factory.mktemp("runs") / "<run>", CONFIG)).read_text())


def test_the_page_is_well_formed_with_unique_ids_that_all_references_find(page: Page) -> None:
    ids = page.all("id")
    assert len(ids) == len(set(ids)) > 10
    targets = [
        target for name in ("aria-labelledby", "aria-describedby") for all_ in page.all(name) for target in all_.split()
    ]
    assert set(targets) | {link.removeprefix("#") for link in page.all("href")} <= set(ids)
    assert [tag for tag, _ in page.elements].count("h1") == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    assert all(link.startswith("#") for link in page.all("href"))
    assert not page.all("src") and not page.all("srcset") and not page.all("style")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    style = page.said("style")
    assert "url(" not in style and "@import" not in style and "http" not in style
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_text_of_data_and_paths_is_shown_and_never_acts(page: Page) -> None:
    shown = " ".join(EVIL.replace("\x07", "\ufffd").replace("\ud800", "\ufffd").replace("\u202e", "\ufffd").split())
    said = page.said()
    assert said.count(shown) >= 4  # the prompt (its end and whole), the gold answer, both written answers
    for words in ("/home/somebody/<b>base</b>", "<i>{question}</i>", "python train.py --output '<b>runs</b>'"):
        assert words in said
    assert not {"b", "i", "img", "script"} & {tag for tag, _ in page.elements}


def test_every_table_has_a_caption_and_every_heading_of_a_cell_its_scope(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 3
    assert {attributes.get("scope") for tag, attributes in page.elements if tag == "th"} == {"col", "row"}


def test_every_picture_has_a_name_and_is_described_or_hidden(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) >= 8
    named = [a for a in pictures if a.get("role") == "img" and a.get("aria-labelledby")]
    assert len(named) + sum(a.get("aria-hidden") == "true" for a in pictures) == len(pictures)


def test_results_stand_there_with_their_intervals_and_the_constant_answer(page: Page) -> None:
    said = page.said("table")
    assert "model perplexity (lower is better) base 20.00 [19.00, 21.00] dense LoRA, step 4 10.00 [9.00, 11.00]" in said
    assert "sparse expert 62.5 [52.5, 72.5] 31.2 best constant answer 25.0 10.0" in said
    assert (
        "dense LoRA, step 4 → sparse expert: perplexity 10.00 → 12.00; pubmedqa accuracy 70.0 % → 62.5 %"
        in page.said("p")
    )


def test_what_was_asked_names_the_settings_that_differ(page: Page) -> None:
    assert "data.train pubmedqa icd10" in page.said("table")
    assert "data.format" not in page.said("table")


def test_time_and_memory_stand_there_by_phase(page: Page) -> None:
    assert "load 1.5 s 4 % 300 train 30.0 s 75 % 1,234 prune 8.5 s 21 % – all 40.0 s 100 % 1,234" in page.said("table")


def test_a_minute_has_sixty_seconds(tmp_path: Path) -> None:
    seconds = {"load": 99.96, "train": 119.6, "prune": 5999.7}
    said = Page(report.write_report(leave_run(tmp_path / "run", seconds=seconds)).read_text()).said("table")
    for told in ("load 100.0 s", "train 2 min 0 s", "prune 1.7 h"):
        assert told in said


def test_the_command_that_scores_names_a_file_where_the_run_has_nothing_to_score_on(tmp_path: Path) -> None:
    def command(name: str, data: DataConfig, **found: Any) -> str:
        folder = leave_run(tmp_path / name, Config(data=data), data={"train": {"rows": 5}, "test": {}, **found})
        said = Page(report.write_report(folder).read_text()).said()
        return said.partition(f"python -m efx_jax.evaluation {folder}")[2].removeprefix(" ").partition(" ")[0]

    assert command("own", DataConfig(train="rows.jsonl"), text="") == "--tasks"
    assert command("text", DataConfig(train="rows.jsonl", text="wikitext"), text="wikitext") != "--tasks"
    assert command("mix", DataConfig(train="mix.yaml"), text="laws.txt") != "--tasks"
    assert command("task", DataConfig(train="rows.jsonl"), test={"triage": {"rows": 3}}) != "--tasks"


def test_right_and_wrong_are_said_in_words(page: Page) -> None:
    said = page.said("article")
    assert "✗ wrong, margin 0.50" in said and "✓ right, margin 0.50" in said and "ROUGE-L 50 %" in said
    assert "right with dense LoRA, step 4: 0 of 1; right with sparse expert: 1 of 1" in page.said("p")


def test_a_smooth_curve_is_named_by_as_many_steps_as_its_means_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 90 lines a twentieth would be 4, and no 4 lines lie around one."""
    charts: list[Chart] = []
    monkeypatch.setattr(report_curves, "line_chart", lambda chart, name: charts.append(chart) or Html(""))
    record = read_record(leave_run(tmp_path / "run"))
    rows = [row | {"loss": float(row["step"] == 30)} for row in metrics(90)]
    page = Page(report_curves.curves(dataclasses.replace(record, metrics=rows)))
    assert "Loss, nats per token (thick: mean of 5 logged steps)" in page.said("figcaption")
    smooth = charts[0].lines[1]
    assert smooth.name == "loss, mean of 5 logged steps"
    found = {step: mean for step, mean in zip(smooth.steps, smooth.values, strict=True) if mean}
    assert found == pytest.approx(dict.fromkeys(range(28, 33), 1 / 5))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("base", "“base”, as no dense adapter was measured"),
        ("base with adapter", "The dense model here is “base with adapter”."),
    ],
)
def test_without_a_dense_adapter_what_the_run_began_with_is_compared_and_named(
    model: str, words: str, tmp_path: Path
) -> None:
    rows = [
        row | {"answers": {model if "dense" in name else name: a for name, a in row["answers"].items()}}
        for row in samples()
    ]
    record = dataclasses.replace(read_record(leave_run(tmp_path / "run")), samples=rows)
    assert words in Page(report.report_page(record)).said()


def test_the_exported_model_has_its_own_tokens_and_only_what_taught_it(tmp_path: Path) -> None:
    config = Config(distill=DistillConfig(teacher="base", text="c4"))
    best = {"metric": "perplexity", "step": 20, "value": 9.0, "stale": 1, "tokens": 1234}
    changed = {"steps": 20, "best": best, "taught": {"teacher": True, "text_rows": 0}}
    said = Page(report.write_report(leave_run(tmp_path / "run", config, **changed)).read_text()).said()
    assert "20 updates, 1,234 tokens" in said
    assert "taught by the base where rows have no labels." in said and "text of c4" not in said
    alone = leave_run(tmp_path / "alone", config, taught={"teacher": False, "text_rows": 0})
    assert "taught by" not in Page(report.write_report(alone).read_text()).said()


def test_a_run_without_training_tasks_or_zeros_has_a_page_too(tmp_path: Path) -> None:
    results = {"base": {}, "dense expert": {}}
    changed = {"results": results, "steps": 0, "events": [], "sparsity": {"q_proj": [0.0, 0.0]}, "seconds": {}}
    folder = leave_run(tmp_path / "run", Config(prune=PruneConfig(sparsity=0.0)), **changed)
    for name in ("metrics", "evaluations", "samples"):
        (folder / f"{name}.jsonl").unlink()
    said = Page(report.write_report(folder).read_text()).said()
    assert "scattered zeros" not in said
    for words in (
        "Nothing was measured",
        "no training, nothing pruned",
        "Nothing was trained",
        "No weight is zero",
        "No answers were kept",
    ):
        assert words in said


def test_a_ruined_model_has_a_page_too(tmp_path: Path) -> None:
    results = summary()["results"]
    results["sparse expert"]["perplexity"] |= {"value": None, "interval": [None, None]}
    folder = leave_run(tmp_path / "run", results=results)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "loss": Infinity, "learning_rate": NaN}\n')
    said = Page(report.write_report(folder).read_text()).said("table")
    assert "sparse expert not finite" in said


def test_the_command_writes_the_page_of_each_run_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [leave_run(tmp_path / name) for name in ("one", "two")]
    assert report.main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html") for run in runs]
    (runs[0] / "summary.json").unlink()
    (runs[1] / "samples.jsonl").write_text("\n[]\n")
    damaged = {
        "summary.json": b"{}",
        "samples.jsonl": b"{}",
        "metrics.jsonl": b'{"loss": 1}',
        "evaluations.jsonl": b"\xff",
    }
    for name, content in damaged.items():
        (leave_run(tmp_path / f"damaged {name}") / name).write_bytes(content)
    for run, said in (
        (tmp_path / "damaged summary.json", "summary.json: holds no results, data, steps"),
        (tmp_path / "damaged samples.jsonl", "samples.jsonl:1: holds no task, row"),
        (tmp_path / "damaged metrics.jsonl", "metrics.jsonl:1: holds no step"),
        (tmp_path / "damaged evaluations.jsonl", "evaluations.jsonl: is not UTF-8 text"),
        (runs[0], "is not finished"),
        (runs[1], "samples.jsonl:2: holds a list"),
        (tmp_path, "is not a run"),
    ):
        assert report.main([str(run)]) == 2
        assert said in capsys.readouterr().err
