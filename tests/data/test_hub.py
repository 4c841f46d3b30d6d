"""Tables of the Hub give the same examples as the official files; no network and no script is needed."""

from pathlib import Path
from typing import Any

import pytest

from efx_jax.data.catalogue import OFFICIAL
from efx_jax.data.corpora import load_rows
from efx_jax.data.health import pubmedqa_table_test, pubmedqa_table_train
from efx_jax.data.hub import HubTable, read_hub
from efx_jax.data.official import load_official
from efx_jax.data.prompts import Example
from efx_jax.errors import InputError

datasets = pytest.importorskip("datasets")

OFFICIAL_PMID, OTHER_PMID = 7482275, 1
QUESTION = {"question": "Does it help?", "long_answer": "It does.", "final_decision": "yes"}
CONTEXT = {"contexts": ["Aims.", "Results."], "labels": ["AIMS", "RESULTS"], "meshes": ["Humans"]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Hub is asked for, and the rows that it answers with."""
    state: dict[str, Any] = {"rows": [], "asked": None}

    def load_dataset(name: str, config: str | None, **asked: Any) -> Any:
        state["asked"] = (name, config, {key: value for key, value in asked.items() if value})
        table = datasets.Dataset.from_list(state["rows"])
        return table.to_iterable_dataset() if asked["streaming"] else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def load(hub: dict[str, Any], name: str, split: str, *rows: dict[str, Any]) -> list[Example]:
    hub["rows"] = list(rows)
    return load_official(OFFICIAL[name], split, "")


def test_pubmedqa_of_the_hub_is_split_by_the_official_ids(hub: dict[str, Any]) -> None:
    rows = [{"pubid": pmid, "context": CONTEXT, **QUESTION} for pmid in (OFFICIAL_PMID, OTHER_PMID)]
    (test,) = load(hub, "pubmedqa", "test", *rows)
    assert hub["asked"] == ("qiaojin/PubMedQA", "pqa_labeled", {"split": "train"})
    assert test.prompt == (
        "Abstract: Aims.\nResults.\nSections: AIMS, RESULTS\nMeSH terms: Humans\nQuestion: Does it help?"
    )
    assert (test.response, test.keys[-1]) == (" yes", f"pubmedqa {OFFICIAL_PMID}")
    (train,) = load(hub, "pubmedqa", "train", *rows)
    assert train.keys[-1] == f"pubmedqa {OTHER_PMID}"
    assert len(load(hub, "pubmedqa", "artificial", *rows)) == 2
    assert hub["asked"][1] == "pqa_artificial"
    numbers = [{"pubid": pmid, "context": CONTEXT, **QUESTION} for pmid in range(7000000, 27000000, 1000)]
    assert len(pubmedqa_table_test(numbers, "x")) + len(pubmedqa_table_train(numbers, "x")) == len(numbers)


def test_casehold_of_the_hub_and_of_lexglue_agree(hub: dict[str, Any]) -> None:
    holdings = [f"holding {number}" for number in range(5)]
    named = {f"holding_{number}": text for number, text in enumerate(holdings)}
    own = load(hub, "casehold", "test", {"example_id": 3, "citing_prompt": "Cited.", **named, "label": "4"})
    files = {"data_files": "all/test/*.parquet", "revision": "refs/convert/parquet", "split": "train"}
    assert hub["asked"] == ("casehold/casehold", None, files)
    assert read_hub(HubTable("some/set", split="test", revision="refs/convert/parquet"))
    assert hub["asked"][2]["data_files"] == "default/test/*.parquet"  # not a place of this disk, "/test/..."
    lexglue = load(hub, "casehold_lexglue", "test", {"context": "Cited.", "endings": holdings, "label": 4})
    assert hub["asked"] == ("coastalcph/lex_glue", "case_hold", {"split": "test"})
    assert own == lexglue
    with pytest.raises(InputError, match="row 1: expected a list of 5 endings"):
        load(hub, "casehold_lexglue", "test", {"context": "Cited.", "endings": holdings[:4], "label": 4})


def test_classes_of_contract_nli_are_contradiction_entailment_neutral(hub: dict[str, Any]) -> None:
    rows = [{"premise": "Contract.", "hypothesis": "So.", "label": label} for label in (0, 1, 2)]
    examples = load(hub, "contract_nli", "test", *rows)
    assert [row.response.strip() for row in examples] == ["contradiction", "entailment", "neutral"]
    assert examples[0].prompt == "Contract: Contract.\nHypothesis: So."
    assert hub["asked"][2]["data_files"] == "contractnli_a/test/*.parquet"
    with pytest.raises(InputError, match="row 1: label -1 is no label"):
        load(hub, "contract_nli", "test", {"premise": "Contract.", "hypothesis": "So.", "label": -1})


def test_billsum_and_meqsum_of_the_hub(hub: dict[str, Any]) -> None:
    (bill,) = load(hub, "billsum", "train", {"text": "SECTION 1.", "summary": "Does.", "title": "To do."})
    assert (bill.prompt, bill.response) == ("Title: To do.\nText: SECTION 1.", " Does.")
    (question,) = load(hub, "hqs", "train", {"CHQ": "Long?", "Summary": "Short?", "File": "1.txt"})
    assert (question.prompt, question.response) == ("Question: Long?", " Short?")
    assert hub["asked"][0] == "albertvillanova/meqsum"


def test_a_split_that_no_public_table_has_names_its_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hqs: no folder hqs under .*; expected MEDIQA2021.*and no public table"):
        load_official(OFFICIAL["hqs"], "test", str(tmp_path))
    with pytest.raises(InputError, match=r"mednli: .*data\.root, which is not set"):
        load_official(OFFICIAL["mednli"], "test", "")


def test_a_data_set_is_read_at_its_revision(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": "a"}]
    assert load_rows("someone/corpus@v2:en:test") == hub["rows"]
    assert hub["asked"] == ("someone/corpus", "en", {"split": "test", "revision": "v2"})
    assert load_rows("someone/corpus@refs/pr/1") == hub["rows"]
    assert hub["asked"] == ("someone/corpus", None, {"split": "train", "revision": "refs/pr/1"})


def test_the_first_rows_come_without_the_rest(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"text": str(number)} for number in range(9)]
    rows = [{"text": "0"}, {"text": "1"}, {"text": "2"}]
    assert read_hub(HubTable("someone/corpus", first=3, streams=True)) == rows
    assert hub["asked"] == ("someone/corpus", None, {"split": "train", "streaming": True})
    assert read_hub(HubTable("someone/corpus", first=3)) == rows
    assert hub["asked"] == ("someone/corpus", None, {"split": "train"})
    assert len(read_hub(HubTable("someone/corpus", first=20))) == 9


def test_blank_texts_of_a_hub_table_are_no_documents(hub: dict[str, Any]) -> None:
    """As every other line of WikiText is."""
    hub["rows"] = [{"text": text} for text in ("", " = A = \n", "\n", "words")]
    assert load_rows("Salesforce/wikitext:wikitext-103-raw-v1:test") == [{"text": " = A = \n"}, {"text": "words"}]
    assert hub["asked"] == ("Salesforce/wikitext", "wikitext-103-raw-v1", {"split": "test"})
