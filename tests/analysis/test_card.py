"""README.md of an export is a card that huggingface_hub accepts, and names no place of the machine it was made on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from efx_jax.analysis.card import card_metadata, card_text
from efx_jax.analysis.record import RunRecord, read_record
from efx_jax.config import Config, DataConfig, ModelConfig, PruneConfig
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.sources import prompt_patterns
from efx_jax.weights.config_json import copy_extras
from tests.analysis.reported import leave_run

HOME = "/home/somebody/secret"
INSTRUCTION = OFFICIAL["pubmedqa"].instruction
INPUT = "Abstract: {abstract}\nSections: {sections}\nMeSH terms: {mesh}\nQuestion: {question}"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    data = DataConfig(train="pubmedqa", format="alpaca", root=HOME, text=f"{HOME}/text.jsonl")
    prune = PruneConfig(score="foresight_gated", group="bounded", recovery="admm", schedule="fractions")
    config = Config(model=ModelConfig(path="meta-llama/Llama-3.2-1B"), data=data, prune=prune)
    return read_record(leave_run(tmp_path_factory.mktemp(HOME.strip("/").replace("/", "-")) / "run", config))


def with_config(record: RunRecord, **sections) -> RunRecord:
    return dataclasses.replace(record, config=dataclasses.replace(record.config, **sections))


def test_the_hub_library_reads_the_card_and_its_results(record: RunRecord) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(card_text(record), ignore_metadata_errors=False)
    data = card.data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "meta-llama/Llama-3.2-1B",
        "transformers",
        "text-generation",
    )
    assert (data.license, data.license_name, data.language) == ("other", "to-be-filled-in", ["en"])
    assert data.datasets == ["qiaojin/PubMedQA"]
    assert {"sparsity-50", "pruning", "lora", "pubmedqa"} <= set(data.tags)
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in data.eval_results}
    assert found == {
        ("text.jsonl", "perplexity"): 12.0,
        ("pubmedqa", "accuracy"): 0.625,
        ("pubmedqa", "macro_f1"): 0.3125,
    }
    again = hub.ModelCard(str(card))
    assert again.data.to_dict() == data.to_dict()


@pytest.mark.parametrize(
    ("train", "text", "found", "named"),
    [
        ("pubmedqa", f"{HOME}/books/wards.jsonl", {}, ("wards", "wards.jsonl")),
        ("pubmedqa", "", {}, ("pubmedqa", "held-out text")),
        ("health_open", "", {"text": f"{HOME}/text_medical/paragraphs.jsonl"}, ("paragraphs", "paragraphs.jsonl")),
        ("icd10", "", {"text": "icd10"}, ("icd10", "icd10")),
        ("gone.yaml", "", {"text": "", "prompts": {}}, ("gone", "held-out text")),
    ],
)
def test_the_card_names_what_perplexity_was_measured_on(
    record: RunRecord, train: str, text: str, found: dict[str, Any], named: tuple[str, str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    record = with_config(record, data=dataclasses.replace(record.config.data, train=train, text=text))
    record = dataclasses.replace(record, summary=record.summary | {"data": record.summary["data"] | found})
    assert f"perplexity: 900 tokens of {named[1]}" in card_text(record)
    results = hub.ModelCard(card_text(record), ignore_metadata_errors=False).data.eval_results
    found = [(each.dataset_type, each.dataset_name) for each in results if each.metric_type == "perplexity"]
    assert found == [named]


def test_the_card_says_what_it_is_what_it_scores_and_what_it_is_not(record: RunRecord) -> None:
    text = card_text(record)
    for words in (
        "# Llama-3.2-1B, 50 % sparse pubmedqa expert",
        "unstructured, every row within 20 % of its matrix",
        "pubmedqa: 1,200 rows (pubmedqa 1,200)",
        "| pubmedqa accuracy % | 40.0 [30.0, 50.0] | 70.0 [60.0, 80.0] | 62.5 [52.5, 72.5] | 25.0 |",
        "evaluated only on this: pubmedqa: 30 rows, the likeliest answer; perplexity: 900 tokens of text.jsonl.",
        "gain neither speed nor memory",
        "no basis for medical, legal",
        "inherits the base model's licence, biases",
        "AutoModelForCausalLM.from_pretrained",
        f"### Instruction:\n{INSTRUCTION}\n\n### Input:\n{INPUT}\n\n### Response:\n",
        "kept weights refitted by ADMM",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("style", "train", "told"),
    [
        ("plain", "owner/rows", "\n```\n{prompt}\n```\n"),
        ("plain", "icd10", "\n```\nDiagnosis: {description}\nICD-10-CM chapter:\n```\n"),
        ("plain", "pubmedqa", f"\n```\n{INSTRUCTION}\n\n{INPUT}\n\nAnswer:\n```\n"),
        ("alpaca", "pubmedqa", f"### Instruction:\n{INSTRUCTION}\n\n### Input:\n{INPUT}\n\n### Response:\n"),
        (
            "chat",
            "pubmedqa",
            f"where `prompt` is (braces stand for what a row fills in):\n\n```\n{INSTRUCTION}\n\n{INPUT}\n",
        ),
        ("alpaca", "owner/rows", "### Instruction:\n{prompt}\n\n### Response:\n"),
        ("chat", "owner/rows", 'apply_chat_template([{"role": "user", "content": prompt}]'),
    ],
)
def test_the_card_says_how_to_write_a_prompt(record: RunRecord, style: Any, train: str, told: str) -> None:
    asked = with_config(record, data=DataConfig(train=train, format=style))
    asked = dataclasses.replace(asked, summary=record.summary | {"data": {"train": {"rows": 5}, "test": {}}})
    _, _, rest = card_text(asked).partition("## Load it")
    assert told in rest and told not in rest.partition("## Training")[2]


def test_a_prompt_is_shown_as_its_template_writes_it(record: RunRecord, tmp_path: Path) -> None:
    def told(data: DataConfig, **found: Any) -> str:
        summary = record.summary | {"data": {"train": {"rows": 5}, "test": {}, **found}}
        text = card_text(dataclasses.replace(with_config(record, data=data), summary=summary))
        return text.partition("## Load it")[2].partition("## Training")[0]

    own = DataConfig(train="rows.jsonl", template="Question: {q} {{of}} ```\\nAnswer: => {a}")
    assert "\n````\nQuestion: {q} {of} ```\nAnswer:\n````\n" in told(own)
    alpaca = dataclasses.replace(own, format="alpaca")
    assert "### Instruction:\nQuestion: {q} {of} ```\nAnswer:\n\n### Response:\n" in told(alpaca)
    mix = tmp_path / "clinic.yaml"
    mix.write_text('tasks:\n  triage: {train: a.jsonl, template: "{note}\\nUrgent? => {urgency}"}\n  hqs: {rows: 3}\n')
    shown = told(DataConfig(train=str(mix)))
    assert "triage:\n\n```\n{note}\nUrgent?\n```\n\nhqs:\n\n```\nSummarise the consumer's health" in shown
    assert "Question: {question}\n\nAnswer:\n```\n" in shown
    # What the run has written down holds, wherever its mix is now.
    prompts = prompt_patterns(DataConfig(train=str(mix)))
    mix.unlink()
    assert told(DataConfig(train=str(mix)), prompts=prompts) == shown
    assert "learned from text alone" in told(DataConfig(train="pages.txt"), prompts={})


def test_nothing_of_the_machine_is_in_the_card(record: RunRecord) -> None:
    named = with_config(
        record, model=ModelConfig(path=f"{HOME}/models/base.gguf"), data=DataConfig(train=f"{HOME}/rows.jsonl")
    )
    named = dataclasses.replace(named, summary=record.summary | {"data": {"train": {"rows": 5}, "test": {}}})
    for told in (card_text(record), card_text(named)):
        assert "somebody" not in told and str(record.folder) not in told and "train.py" not in told
    assert "base_model" not in card_metadata(named) and "datasets" not in card_metadata(named)
    assert "language" not in card_metadata(named)
    assert "# base, 50 % sparse rows expert" in card_text(named)
    assert "add it to the metadata as `base_model`" in card_text(named)
    assert "add it to the metadata" not in card_text(record)


def test_the_quickstart_and_a_folder_that_looks_like_a_name_of_the_hub(
    record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart = with_config(record, model=ModelConfig(path="quickstart"))
    assert card_metadata(quickstart)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / "meta-llama" / "Llama-3.2-1B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card_metadata(record)


def test_revisions_are_told_where_the_hub_has_a_place_for_them(record: RunRecord) -> None:
    """Its metadata has none."""
    pinned = with_config(
        record, model=ModelConfig(path="owner/base@v1.0"), data=DataConfig(train="owner/rows@refs/pr/1:en:train")
    )
    metadata = card_metadata(pinned)
    assert (metadata["base_model"], metadata["datasets"][-1]) == ("owner/base", "owner/rows")
    assert "owner/base@v1.0" in card_text(pinned) and "# base, 50 % sparse rows expert" in card_text(pinned)


def test_names_that_yaml_or_markdown_would_read_otherwise_stay_names(record: RunRecord) -> None:
    evil = with_config(record, data=DataConfig(train="---\n<b>a: [b](http://c)|d`"))
    head, _, body = card_text(evil).removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["tags"][-1] == "c)d"
    assert body.startswith("\n# Llama-3.2-1B, 50 % sparse c)d expert\n")


def test_names_of_tasks_do_not_act_either(record: RunRecord) -> None:
    (name,) = record.summary["results"]["base"]["tasks"]
    results = json.loads(json.dumps(record.summary["results"]).replace(f'"{name}"', '"<img src=y onerror=z>"'))
    evil = dataclasses.replace(record, summary=record.summary | {"results": results})
    assert "<img" not in card_text(evil).partition("\n---\n")[2]


def test_a_model_that_was_pruned_alone_is_not_said_to_be_trained(record: RunRecord) -> None:
    text = card_text(dataclasses.replace(record, summary=record.summary | {"steps": 0}))
    assert "Llama-3.2-1B, pruned for pubmedqa with" in text and "no training; entries chosen by" in text
    for words in ("fine-tuned on", "taught by", "mask in training"):
        assert words not in text


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        (PruneConfig(group="2:4"), "semi-structured 2:4: 2 of 4 consecutive inputs are kept"),
        (PruneConfig(score="atp"), "structured: whole heads and hidden units cut out"),
        (PruneConfig(sparsity=0.0), "No weight is pruned."),
        (PruneConfig(schedule="cubic"), "10 events on a cubic ramp"),
    ],
)
def test_every_pattern_has_its_words(record: RunRecord, prune: PruneConfig, words: str) -> None:
    changed = with_config(record, prune=prune)
    if prune.score == "atp":
        changed = dataclasses.replace(changed, summary=record.summary | {"cut": {"removed": 0.5}})
    assert words in card_text(changed)
    assert ("scattered zeros" in card_text(changed)) == (prune.score != "atp" and prune.sparsity > 0)


def test_a_card_of_the_base_is_not_taken_for_the_experts(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "tokenizer.json"):
        (tmp_path / name).write_text("of the base")
    copy_extras(tmp_path, tmp_path / "export")
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"LICENSE", "tokenizer.json"}
