"""The health tasks' official files and Hub tables as records: PubMedQA, MedNLI, HQS, Evidence Inference 2.0."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from efx_jax.data.corpora import load_rows
from efx_jax.data.records import (
    NLI_LABELS,
    Record,
    read_object,
    require_object,
    take_label,
    take_text,
    take_texts,
)
from efx_jax.data.sheets import read_sheet
from efx_jax.errors import InputError

PUBMEDQA_LABELS = ("yes", "no", "maybe")
# The third class says that a trial found no difference, not that the text leaves the hypothesis open.
EVIDENCE_LABELS = ("entailment", "contradiction", "no difference")

_DECISIONS = {label: label for label in PUBMEDQA_LABELS}
_NLI = {label: label for label in NLI_LABELS}
# The official file spells one label in two ways.
_FINDINGS = {
    "significantly increased": "entailment",
    "significantly increase": "entailment",
    "significantly decreased": "contradiction",
    "no significant difference": "no difference",
}
_TRUTH = {"True": "yes", "False": ""}
_OFFICIAL_TEST = pathlib.Path(__file__).with_name("pubmedqa_test_ids.txt")


def pubmedqa_test(paths: Sequence[pathlib.Path]) -> list[Record]:
    """The rows of ori_pqal.json whose PMIDs are in test_ground_truth.json, with the labels given there.

    Raises:
        InputError: a malformed row, or a PMID that has no row or a different label in ori_pqal.json.
    """
    labelled, truth = pubmedqa_rows(paths[:1]), read_object(paths[1])
    by_number = {record.number: record for record in labelled}
    for number in truth:
        answer = take_label(truth, number, str(paths[1]), _DECISIONS)
        if number not in by_number or by_number[number].answer != answer:
            found = by_number[number].answer if number in by_number else "no such row"
            raise InputError(f"{paths[1]} {number}: expected the label of {paths[0].name}, {answer}, found {found}")
    return [record for record in labelled if record.number in truth]


def pubmedqa_train(paths: Sequence[pathlib.Path]) -> list[Record]:
    """The rows of ori_pqal.json whose PMIDs are not in test_ground_truth.json."""
    truth = read_object(paths[1])
    return [record for record in pubmedqa_rows(paths[:1]) if record.number not in truth]


def pubmedqa_rows(paths: Sequence[pathlib.Path]) -> list[Record]:
    """All rows of ori_pqal.json, or of ori_pqaa.json (the automatically labelled set)."""
    records = []
    for number, row in read_object(paths[0]).items():
        where = f"{paths[0]} {number}"
        contents = require_object(row, where)
        records.append(_pubmedqa(contents, ("QUESTION", "CONTEXTS", "LABELS", "MESHES"), contents, where, number))
    return records


def pubmedqa_table(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """Rows of the Hub's qiaojin/PubMedQA: pubid, question, context {contexts, labels, meshes}, final_decision."""
    records = []
    for where, row in _numbered(rows, source):
        context = require_object(row.get("context"), f"{where} context")
        keys = ("question", "contexts", "labels", "meshes")
        records.append(_pubmedqa(row, keys, context, where, str(row.get("pubid", ""))))
    return records


def _pubmedqa(
    row: Mapping[str, Any], keys: tuple[str, str, str, str], context: Mapping[str, Any], where: str, number: str
) -> Record:
    """A question of PubMedQA; `keys`: the question in `row`, texts, section names and MeSH terms in `context`."""
    question, texts, sections, mesh = keys
    fields = {
        "question": take_text(row, question, where),
        "abstract": _abstract(context, texts, where),
        "sections": ", ".join(take_texts(context, sections, where)),
        "mesh": ", ".join(take_texts(context, mesh, where)),
    }
    return Record(fields, take_label(row, "final_decision", where, _DECISIONS), where, number)


def pubmedqa_table_test(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """The official test rows of the Hub's labelled table, which has all 1,000 in one split."""
    official = _official_test()
    return [record for record in pubmedqa_table(rows, source) if record.number in official]


def pubmedqa_table_train(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """The rows of the Hub's labelled table that are not in the official test set."""
    official = _official_test()
    return [record for record in pubmedqa_table(rows, source) if record.number not in official]


def mednli(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Rows of mli_{train,dev,test}_v1.jsonl (SNLI style): sentence1 the premise, sentence2 the hypothesis."""
    rows = load_rows(str(paths[0]))
    return [
        Record(
            {"premise": take_text(row, "sentence1", where), "hypothesis": take_text(row, "sentence2", where)},
            take_label(row, "gold_label", where, _NLI),
            where,
        )
        for where, row in _numbered(rows, str(paths[0]))
    ]


def meqsum(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Rows of the MeQSum workbook, sheet QS: a consumer's question and its summary."""
    return _questions(read_sheet(paths[0], "QS", ("File", "CHQ", "Summary")), "CHQ")


def mediqa(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Rows of a MEDIQA 2021 task 1 workbook."""
    return _questions(read_sheet(paths[0], "", ("q_id", "NLM Question", "Summary")), "NLM Question")


def meqsum_table(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """Rows of MeQSum as a table with the workbook's columns."""
    return _questions(_numbered(rows, source), "CHQ")


def evidence_inference(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Evidence Inference 2.0 as natural language inference: annotations, prompts and the article ids of a split.

    The premise is the passage of a prompt's first annotation with valid label and valid reasoning, or if there is none,
    of the first with a valid label; the hypothesis says that the intervention significantly increased the outcome.
    Prompts whose valid annotations disagree are left out.

    Raises:
        InputError: a malformed row, an unknown label, or an annotation of an unknown prompt.
    """
    annotations, prompts, articles = paths
    wanted = {number for row in load_rows(str(articles)) for number in row["text"].split()}
    asked = {row.get("PromptID"): (where, row) for where, row in _numbered(load_rows(str(prompts)), str(prompts))}
    labels: dict[str, set[str]] = {}
    firsts: dict[str, tuple[str, str]] = {}
    reasoned: dict[str, tuple[str, str]] = {}
    for where, row in _numbered(load_rows(str(annotations)), str(annotations)):
        if not take_label(row, "Valid Label", where, _TRUTH):
            continue
        prompt = take_text(row, "PromptID", where)
        if take_text(row, "PMCID", where) not in wanted:
            continue
        if prompt not in asked:
            raise InputError(f"{where}: no PromptID {prompt} in {prompts.name}; expected both files of one release")
        labels.setdefault(prompt, set()).add(take_label(row, "Label", where, _FINDINGS))
        passage = (take_text(row, "Annotations", where), where)
        firsts.setdefault(prompt, passage)
        if take_label(row, "Valid Reasoning", where, _TRUTH):
            reasoned.setdefault(prompt, passage)
    return [
        Record({"premise": premise, "hypothesis": _hypothesis(*asked[prompt])}, next(iter(labels[prompt])), where)
        for prompt, (premise, where) in (firsts | reasoned).items()
        if len(labels[prompt]) == 1
    ]


def _hypothesis(where: str, row: Mapping[str, Any]) -> str:
    intervention, outcome, comparator = (
        take_text(row, key, where) for key in ("Intervention", "Outcome", "Comparator")
    )
    return f"{intervention} significantly increased {outcome} compared with {comparator}."


def _abstract(row: Mapping[str, Any], key: str, where: str) -> str:
    texts = take_texts(row, key, where)
    if not texts:
        raise InputError(f"{where}: {key!r} is empty; expected a text; repair or remove the row")
    return "\n".join(texts)


def _questions(rows: Iterable[tuple[str, Mapping[str, Any]]], column: str) -> list[Record]:
    return [
        Record({"question": take_text(row, column, where)}, take_text(row, "Summary", where), where)
        for where, row in rows
    ]


def _numbered(rows: Sequence[Mapping[str, Any]], source: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, start=1)]


def _official_test() -> set[str]:
    return set(_OFFICIAL_TEST.read_text(encoding="utf-8").split())
