"""Every task reads its official files as they are published, and names file and row of whatever is wrong in them."""

import csv
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from efx_jax.config import DataConfig
from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.official import load_official
from efx_jax.data.prompts import Example
from efx_jax.data.tasks import load_data, load_tasks
from efx_jax.errors import InputError

ABSTRACT = {"CONTEXTS": ["Aims here.", "Results here."], "LABELS": ["AIMS", "RESULTS"], "MESHES": ["Humans", "Aspirin"]}
HOLDINGS = {f"holding_{number}": f"holding number {number}" for number in range(5)}


def pubmedqa_row(decision: str = "yes", question: str = "Does it help?") -> dict[str, Any]:
    return {"QUESTION": question, **ABSTRACT, "YEAR": None, "final_decision": decision, "LONG_ANSWER": "It does."}


def contract(identity: int, choices: tuple[str, str]) -> dict[str, Any]:
    annotations = {f"nda-{number}": {"choice": choice, "spans": []} for number, choice in enumerate(choices)}
    return {
        "id": identity,
        "text": f"Contract {identity}.",
        "spans": [],
        "annotation_sets": [{"annotations": annotations}],
    }


def contracts() -> dict[str, Any]:
    return {
        "documents": [contract(1, ("Entailment", "NotMentioned")), contract(2, ("Contradiction", "Entailment"))],
        "labels": {f"nda-{number}": {"hypothesis": f"Hypothesis {number}."} for number in range(2)},
    }


def write_json(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def write_sheet(path: Path, rows: list[list[Any]], sheet: str = "QS") -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    book.active.title = sheet
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def load(name: str, split: str, root: Path) -> list[Example]:
    return load_official(OFFICIAL[name], split, str(root))


def refused(name: str, split: str, root: Path, *expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load(name, split, root)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value), str(caught.value)


def test_pubmedqa_trains_on_what_the_official_test_ids_leave(tmp_path: Path) -> None:
    rows = {"11": pubmedqa_row("yes"), "12": pubmedqa_row("no"), "13": pubmedqa_row("maybe")}
    write_json(tmp_path / "pubmedqa/ori_pqal.json", rows)
    write_json(tmp_path / "pubmedqa/test_ground_truth.json", {"12": "no"})
    write_json(tmp_path / "pubmedqa/ori_pqaa.json", {"99": pubmedqa_row("no")})
    assert [(row.response, row.keys[-1]) for row in load("pubmedqa", "train", tmp_path)] == [
        (" yes", "pubmedqa 11"),
        (" maybe", "pubmedqa 13"),
    ]
    (test,) = load("pubmedqa", "test", tmp_path)
    assert test.prompt == (
        "Abstract: Aims here.\nResults here.\nSections: AIMS, RESULTS\nMeSH terms: Humans, Aspirin\n"
        "Question: Does it help?"
    )
    assert test.prompt[slice(*test.context)] == "Aims here.\nResults here."
    assert test.origin.endswith("ori_pqal.json 12")
    assert [row.response for row in load("pubmedqa", "artificial", tmp_path)] == [" no"]


def test_malformed_pubmedqa_is_named_by_file_and_pmid(tmp_path: Path) -> None:
    truth = write_json(tmp_path / "pubmedqa/test_ground_truth.json", {"12": "no"})
    path = tmp_path / "pubmedqa/ori_pqal.json"

    def bad(row: Any, *expected: str) -> None:
        write_json(path, {"11": pubmedqa_row(), "12": row})
        refused("pubmedqa", "test", tmp_path, "ori_pqal.json 12", *expected)

    bad({key: value for key, value in pubmedqa_row("no").items() if key != "QUESTION"}, "'QUESTION'", "CONTEXTS")
    bad(pubmedqa_row("perhaps"), "final_decision 'perhaps'", "'yes', 'no', 'maybe'")
    bad(pubmedqa_row("no", question=" "), "'QUESTION' is empty")
    bad(pubmedqa_row("no") | {"CONTEXTS": []}, "'CONTEXTS' is empty")
    bad(pubmedqa_row("no") | {"CONTEXTS": "text"}, "list of texts 'CONTEXTS'", "str")
    bad(["no"], "JSON object", "list")
    write_json(path, {"12": pubmedqa_row("yes")})
    refused("pubmedqa", "test", tmp_path, "test_ground_truth.json 12", "no, found yes")
    write_json(path, {"11": pubmedqa_row("yes")})
    refused("pubmedqa", "test", tmp_path, "test_ground_truth.json 12", "no such row")
    path.write_text('{"11": {"QUESTION":\n "Does')
    refused("pubmedqa", "train", tmp_path, "ori_pqal.json line 2", "not JSON")
    truth.unlink()
    refused("pubmedqa", "train", tmp_path, "test_ground_truth.json", str(tmp_path), "github.com/pubmedqa")


def test_mednli_reads_the_users_own_copy(tmp_path: Path) -> None:
    row = {"pairID": "1", "gold_label": "neutral", "sentence1": "He coughs.", "sentence2": "He is ill."}
    write_lines(tmp_path / "mednli/mli_test_v1.jsonl", [row, row | {"gold_label": "-"}])
    refused("mednli", "test", tmp_path, "mli_test_v1.jsonl row 2", "'-'", "neutral")
    write_lines(tmp_path / "mednli/mli_test_v1.jsonl", [row])
    (example,) = load("mednli", "test", tmp_path)
    assert (example.prompt, example.response) == ("Premise: He coughs.\nHypothesis: He is ill.", " neutral")
    refused("mednli", "train", tmp_path, "mli_train_v1.jsonl", "physionet.org")
    refused("mednli", "train", tmp_path / "elsewhere", "mli_train_v1.jsonl", "credentialed", "physionet.org")


def test_hqs_reads_three_columns_of_its_sheet(tmp_path: Path) -> None:
    path = tmp_path / "hqs/MeQSum_ACL2019_BenAbacha_Demner-Fushman.xlsx"
    rows = [["File", "CHQ", "Summary", "far"], ["1.txt", "Long question", "Short?", "x"], [None] * 4]
    write_sheet(path, rows)
    (example,) = load("hqs", "train", tmp_path)
    assert (example.prompt, example.response) == ("Question: Long question", " Short?")
    assert example.origin.endswith("xlsx row 2")
    test = tmp_path / "hqs/MEDIQA2021-Task1-TestSet-ReferenceSummaries.xlsx"
    write_sheet(test, [["q_id", "NLM Question", "Summary"], [1, "Other question", "Other?"]], "Sheet1")
    assert [row.response for row in load("hqs", "test", tmp_path)] == [" Other?"]
    write_sheet(path, rows, "Tables")
    refused("hqs", "train", tmp_path, "MeQSum", "'QS'", "Tables")
    write_sheet(path, [["File", "Question", "Summary"], ["1.txt", "Long", "Short?"]])
    refused("hqs", "train", tmp_path, "row 1", "File, CHQ, Summary", "found File, Question, Summary")
    write_sheet(path, [rows[0][:3], ["1.txt", "Long question", None]])
    refused("hqs", "train", tmp_path, "row 2", "'Summary'")
    path.write_text("no workbook")
    refused("hqs", "train", tmp_path, "not a readable Excel file")
    write_sheet(path, rows)
    with zipfile.ZipFile(path) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as cut:
        for name, content in contents.items():
            cut.writestr(name, content[:-40] if name.endswith("sheet1.xml") else content)
    refused("hqs", "train", tmp_path, "MeQSum", "not a readable Excel file (ParseError")


def test_casehold_reads_numbered_columns_and_named_ones(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "casehold/train.csv",
        [list(range(13)), [7, "Cited (<HOLDING>)", *HOLDINGS.values(), 0.1, 0.2, 0.3, 0.4, 0.5, 2]],
    )
    named = {"example_id": "7", "citing_prompt": "Cited (<HOLDING>)", **HOLDINGS, "label": "2"}
    write_lines(tmp_path / "casehold/test.jsonl", [named, named | {"label": 3}])
    (train,), test = load("casehold", "train", tmp_path), load("casehold", "test", tmp_path)
    assert train == test[0]
    assert train.prompt == "Excerpt: Cited (<HOLDING>)\n" + "\n".join(f"{n}: holding number {n}" for n in range(5))
    assert [row.response for row in test] == [" 2", " 3"]
    write_lines(tmp_path / "casehold/test.jsonl", [named, named | {"label": "5"}])
    refused("casehold", "test", tmp_path, "test.jsonl row 2", "'5'")
    write_lines(tmp_path / "casehold/test.jsonl", [named | {"holding_3": ""}])
    refused("casehold", "test", tmp_path, "test.jsonl row 1", "'holding_3' is empty")


def test_contract_nli_pairs_documents_with_hypotheses(tmp_path: Path) -> None:
    path = write_json(tmp_path / "contract_nli/test.json", contracts())
    pairs = load("contract_nli", "test", tmp_path)
    assert [row.response.strip() for row in pairs] == ["entailment", "neutral", "contradiction", "entailment"]
    assert pairs[1].prompt == "Contract: Contract 1.\nHypothesis: Hypothesis 1."
    assert pairs[0].keys == pairs[1].keys != pairs[2].keys
    write_lines(
        tmp_path / "contract_nli/dev.jsonl", [{"sentence1": "Contract 1.", "sentence2": "So.", "label": "neutral"}]
    )
    assert [row.response for row in load("contract_nli", "validation", tmp_path)] == [" neutral"]

    def bad(change: Callable[[dict[str, Any]], Any], *expected: str) -> None:
        tree = contracts()
        change(tree)
        write_json(path, tree)
        refused("contract_nli", "test", tmp_path, "test.json", *expected)

    bad(lambda tree: tree.pop("documents"), "'documents'")
    bad(lambda tree: tree["documents"][1].update(text=""), "document 2", "'text' is empty")
    bad(lambda tree: tree["documents"][1]["annotation_sets"].clear(), "document 2", "'annotation_sets'")
    annotations = "annotations"
    bad(
        lambda tree: tree["documents"][0]["annotation_sets"][0][annotations].pop("nda-1"), "document 1 annotation nda-1"
    )
    bad(
        lambda tree: tree["documents"][0]["annotation_sets"][0][annotations]["nda-1"].update(choice="Maybe"),
        "document 1 annotation nda-1",
        "'Maybe'",
    )
    bad(lambda tree: tree["labels"].update({"nda-1": {}}), "labels nda-1", "'hypothesis'")


def test_billsum_reads_both_layouts(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "billsum/us_train_data.jsonl", [{"text": "SECTION 1.", "summary": "Does.", "title": "To do."}]
    )
    write_lines(
        tmp_path / "billsum/test.jsonl",
        [{"source": "To do. <SECTION-HEADER> SECTION 1. <SECTION-HEADER> SEC. 2.", "summary": "Does."}],
    )
    (train,), (test,) = load("billsum", "train", tmp_path), load("billsum", "test", tmp_path)
    assert train.prompt == "Title: To do.\nText: SECTION 1."
    assert test.prompt == "Title: To do.\nText: SECTION 1. <SECTION-HEADER> SEC. 2."
    assert test.prompt[slice(*test.context)].startswith("SECTION 1.")
    write_lines(tmp_path / "billsum/test.jsonl", [{"source": "To do.", "summary": "Does."}, {"source": "To do."}])
    refused("billsum", "test", tmp_path, "test.jsonl row 2", "no 'summary'")


def test_evidence_inference_takes_prompts_whose_valid_labels_agree(tmp_path: Path) -> None:
    folder = tmp_path / "evidence_inference"
    header = ["UserID", "PromptID", "PMCID", "Valid Label", "Valid Reasoning", "Label", "Annotations"]
    rows = [
        ["0", "1", "100", "False", "False", "significantly decreased", "Wrong."],
        ["0", "1", "100", "True", "False", "significantly increase", "Rose, of something else."],
        ["0", "1", "100", "True", "True", "significantly increase", "Rose."],
        ["1", "1", "100", "True", "True", "significantly increased", "Rose too."],
        ["0", "2", "100", "True", "True", "no significant difference", "Same."],
        ["1", "2", "100", "True", "True", "significantly decreased", "Fell."],
        ["0", "3", "200", "True", "True", "significantly decreased", "Fell."],
        ["0", "4", "100", "True", "False", "no significant difference", "Same."],
    ]
    write_csv(folder / "v2_annotations.csv", [header, *rows])
    prompts = [[str(number), "100", "pain", "aspirin", "placebo"] for number in range(1, 5)]
    names = ["PromptID", "PMCID", "Outcome", "Intervention", "Comparator"]
    write_csv(folder / "prompts_merged.csv", [names, *prompts])
    (folder / "splits").mkdir()
    (folder / "splits/ev2_test_article_ids.txt").write_text("100\n")
    examples = load("evidence_inference", "test", tmp_path)
    assert [row.response for row in examples] == [" entailment", " no difference"]
    assert examples[0].prompt == (
        "Premise: Rose.\nHypothesis: aspirin significantly increased pain compared with placebo."
    )
    write_csv(folder / "v2_annotations.csv", [header, *rows, ["0", "4", "100", "True", "True", "rose", "Rose."]])
    refused("evidence_inference", "test", tmp_path, "v2_annotations.csv row 9", "'rose'")
    write_csv(
        folder / "v2_annotations.csv", [header, ["0", "9", "100", "True", "True", "significantly increased", "Rose."]]
    )
    refused("evidence_inference", "test", tmp_path, "v2_annotations.csv row 1", "no PromptID 9")
    write_csv(folder / "v2_annotations.csv", [header, *rows])
    # A byte order mark is no part of the first number.
    (folder / "splits/ev2_test_article_ids.txt").write_text("100\r\n200\r\n", encoding="utf-8-sig")
    assert len(load("evidence_inference", "test", tmp_path)) == 3
    (folder / "splits/ev2_test_article_ids.txt").write_text("100\n", encoding="utf-16")
    refused("evidence_inference", "test", tmp_path, "ev2_test_article_ids.txt: not readable as UTF-8 text")


def test_a_task_brings_its_labels_in_the_configured_format(tmp_path: Path) -> None:
    write_json(tmp_path / "contract_nli/test.json", contracts())
    (plain,) = load_tasks(["contract_nli"], DataConfig(root=str(tmp_path)))
    assert (plain.name, plain.labels) == ("contract_nli", (" entailment", " contradiction", " neutral"))
    assert plain.test[0].prompt.endswith(
        "Reply with entailment, contradiction or neutral.\n\n"
        "Contract: Contract 1.\nHypothesis: Hypothesis 0.\n\nAnswer:"
    )
    (alpaca,) = load_tasks(["contract_nli"], DataConfig(root=str(tmp_path), format="alpaca"))
    prompt = alpaca.test[0].prompt
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert prompt.endswith(
        "neutral.\n\n### Input:\nContract: Contract 1.\nHypothesis: Hypothesis 0.\n\n### Response:\n"
    )
    assert prompt[slice(*alpaca.test[0].context)] == "Contract 1."
    assert (alpaca.labels, alpaca.test[0].response) == (("entailment", "contradiction", "neutral"), "entailment")
    (evidence, hqs) = (OFFICIAL["evidence_inference"], OFFICIAL["hqs"])
    assert "stand-in" in evidence.note and "MedNLI" in evidence.note
    assert hqs.labels == () and hqs.new_tokens > 10


def test_another_split_is_scored_by_its_name_and_is_not_learned(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write_json(tmp_path / f"contract_nli/{name}.json", contracts())
    (dev,) = load_tasks(["contract_nli:validation"], DataConfig(root=str(tmp_path)))
    assert dev.name == "contract_nli:validation"
    assert dev.labels == (" entailment", " contradiction", " neutral")
    assert all("dev.json" in row.origin for row in dev.test)
    with pytest.raises(InputError, match="contract_nli: no split 'dev'; expected one of train, validation, test"):
        load_tasks(["contract_nli:dev"], DataConfig(root=str(tmp_path)))
    other = contracts()
    other["documents"] += [contract(3, ("Entailment", "Entailment")), contract(4, ("Entailment", "Entailment"))]
    write_json(tmp_path / "contract_nli/train.json", other)
    test = contracts()
    test["documents"] = [contract(4, ("Entailment", "Entailment"))]
    write_json(tmp_path / "contract_nli/test.json", test)
    config = DataConfig(train="contract_nli", test=("contract_nli:validation",), root=str(tmp_path), holdout=0)
    with pytest.warns(UserWarning, match="contract_nli: 6 training rows are test rows too"):
        learned = load_data(config, seed=0).train
    assert {row.prompt.split("Contract: ")[1][:11] for row in learned} == {"Contract 3."}


def test_a_file_called_as_a_task_does_not_stand_for_its_test_rows(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_json(tmp_path / f"contract_nli/{name}.json", contracts())
    more = contracts()
    more["documents"].append(contract(3, ("Entailment", "Entailment")))
    write_json(tmp_path / "contract_nli/train.json", more)
    own = tmp_path / "contract_nli.jsonl"
    write_lines(own, [{"prompt": f"{word}?", "response": word} for word in ("yes", "no")])
    config = DataConfig(train="contract_nli", test=(str(own),), root=str(tmp_path), holdout=0)
    with pytest.warns(UserWarning, match="contract_nli: 4 training rows are test rows too"):
        assert len(load_data(config, seed=0).train) == 2
