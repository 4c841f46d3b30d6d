"""The legal tasks' official files and Hub tables as records: CaseHOLD, ContractNLI, BillSum."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from efx_jax.data.corpora import load_rows
from efx_jax.data.records import NLI_LABELS, Record, read_object, require_object, take_label, take_text
from efx_jax.errors import InputError

CASEHOLD_LABELS = ("0", "1", "2", "3", "4")

_HOLDINGS = tuple(f"holding_{number}" for number in CASEHOLD_LABELS)
_CHOICES: dict[Any, str] = {label: label for label in CASEHOLD_LABELS} | {
    int(label): label for label in CASEHOLD_LABELS
}
# The official CSV names its columns by numbers: index, prompt, five holdings, five similarity scores, label.
_NUMBERED = {"1": "citing_prompt", "12": "label"} | {str(place): name for place, name in enumerate(_HOLDINGS, start=2)}
_NLI: dict[Any, str] = {label: label for label in NLI_LABELS} | {
    "Entailment": "entailment",
    "Contradiction": "contradiction",
    "NotMentioned": "neutral",
}
_CLASSES: dict[Any, str] = {0: "contradiction", 1: "entailment", 2: "neutral"}  # in the Hub's ContractNLI
_SECTION = "<SECTION-HEADER>"


def casehold(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Rows of the official CSV (columns 0 ... 12) or of a table with citing_prompt, holding_0 ... holding_4, label."""
    rows = load_rows(str(paths[0]))
    if "12" in rows[0] and "citing_prompt" not in rows[0]:
        rows = [{_NUMBERED.get(name, name): value for name, value in row.items()} for row in rows]
    return casehold_table(rows, str(paths[0]))


def casehold_table(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """Rows with citing_prompt, holding_0 ... holding_4, label; or, as in LexGLUE, with context, endings, label."""
    records = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        if "endings" in row:
            row = _spread_endings(row, where)
        fields = {name: take_text(row, name, where) for name in ("citing_prompt", *_HOLDINGS)}
        records.append(Record(fields, take_label(row, "label", where, _CHOICES), where))
    return records


def _spread_endings(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != len(_HOLDINGS):
        raise InputError(f"{where}: expected a list of {len(_HOLDINGS)} endings, found {str(endings)[:40]!r}")
    named = {"citing_prompt": row.get("context"), "label": row.get("label")}
    return named | dict(zip(_HOLDINGS, endings, strict=True))


def contract_nli(paths: Sequence[pathlib.Path]) -> list[Record]:
    """The official JSON: every document with every hypothesis, or a table of sentence1, sentence2, label."""
    if paths[0].suffix != ".json":
        return _pairs(load_rows(str(paths[0])), str(paths[0]), ("sentence1", "sentence2"), _NLI)
    tree, path = read_object(paths[0]), str(paths[0])
    if not isinstance(tree.get("documents"), list):
        raise InputError(f"{path}: no list 'documents'; expected the official ContractNLI JSON; fetch it again")
    hypotheses = {
        key: take_text(require_object(value, f"{path} labels {key}"), "hypothesis", f"{path} labels {key}")
        for key, value in require_object(tree.get("labels"), f"{path} labels").items()
    }
    return [
        record
        for number, document in enumerate(tree["documents"], start=1)
        for record in _document_pairs(require_object(document, f"{path} document {number}"), hypotheses, path, number)
    ]


def _document_pairs(document: Mapping[str, Any], hypotheses: Mapping[str, str], path: str, number: int) -> list[Record]:
    where = f"{path} document {number}"
    text = take_text(document, "text", where)
    sets = document.get("annotation_sets")
    if not isinstance(sets, list) or not sets:
        raise InputError(f"{where}: no 'annotation_sets'; expected one with the 17 choices; is the file complete?")
    choices = require_object(require_object(sets[0], where).get("annotations"), f"{where} annotations")
    records = []
    for key, hypothesis in hypotheses.items():
        choice = require_object(choices.get(key), f"{where} annotation {key}")
        answer = take_label(choice, "choice", f"{where} annotation {key}", _NLI)
        records.append(Record({"document": text, "hypothesis": hypothesis}, answer, f"{where} {key}"))
    return records


def contract_nli_table(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """Rows of the Hub's kiddothe2b/contract-nli: premise, hypothesis and class number."""
    return _pairs(rows, source, ("premise", "hypothesis"), _CLASSES)


def _pairs(
    rows: Sequence[Mapping[str, Any]], source: str, names: tuple[str, str], labels: Mapping[Any, str]
) -> list[Record]:
    records = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        fields = {"document": take_text(row, names[0], where), "hypothesis": take_text(row, names[1], where)}
        records.append(Record(fields, take_label(row, "label", where, labels), where))
    return records


def billsum(paths: Sequence[pathlib.Path]) -> list[Record]:
    """Rows of the official JSON lines (text, summary, title) or of D-Pruner's (source, summary)."""
    return billsum_table(load_rows(str(paths[0])), str(paths[0]))


def billsum_table(rows: Sequence[Mapping[str, Any]], source: str) -> list[Record]:
    """Rows with text, summary, title; or with source, summary, where the title is what precedes the first section."""
    records = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        if "source" in row and "text" not in row:
            before, _, after = take_text(row, "source", where).partition(_SECTION)
            fields = (
                {"title": before.strip(), "text": after.strip()} if after.strip() else {"title": "", "text": before}
            )
        else:
            # California's bills have no title.
            title = take_text(row, "title", where) if row.get("title") else ""
            fields = {"title": title, "text": take_text(row, "text", where)}
        records.append(Record(fields, take_text(row, "summary", where), where))
    return records
