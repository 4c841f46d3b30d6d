"""Rows come back as written; whatever is wrong is named with file and line."""

import dataclasses
import errno
import gzip
import json
import pathlib
import re

import pytest

from efx_jax.data import corpora
from efx_jax.data.corpora import CORPORA, load_rows
from efx_jax.errors import InputError

ROWS = [{"text": "first, with comma"}, {"text": "second é"}]


def write(path: pathlib.Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def refused(source: str, *expected: str, root: str = "") -> None:
    with pytest.raises(InputError) as caught:
        load_rows(source, root)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


def test_every_format_gives_the_same_rows(tmp_path: pathlib.Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert load_rows(write(tmp_path / "a.jsonl", lines + "\n\n")) == ROWS
    assert load_rows(write(tmp_path / "a.json", json.dumps(ROWS, indent=1))) == ROWS
    assert load_rows(write(tmp_path / "b.json", "\n " + json.dumps(ROWS))) == ROWS
    assert load_rows(write(tmp_path / "a.csv", '\ufefftext\r\n"first, with comma"\r\nsecond é\r\n')) == ROWS
    assert load_rows(write(tmp_path / "a.tsv", "text\nfirst, with comma\nsecond é\n")) == ROWS
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert load_rows(str(tmp_path / "a.jsonl.gz")) == ROWS
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")) == ROWS


def test_a_csv_value_may_span_lines(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.csv", 'prompt,response\n"one\ntwo",x\n')
    assert load_rows(source) == [{"prompt": "one\ntwo", "response": "x"}]


@pytest.mark.parametrize("text", ['"Confidential Information" means this', 'He said "stop"', '"', '"one" and "two"'])
def test_a_quote_in_a_tsv_without_quoting_is_part_of_the_text(tmp_path: pathlib.Path, text: str) -> None:
    rows = [{"premise": text, "label": "yes"}, {"premise": 'ends here"', "label": "no"}]
    lines = ["premise\tlabel", *(f"{row['premise']}\t{row['label']}" for row in rows)]
    assert load_rows(write(tmp_path / "a.tsv", "\n".join(lines) + "\n")) == rows


def test_a_quoted_tsv_is_read_as_a_csv(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.tsv", 'premise\tlabel\n"a ""b"""\t"yes"\n"one\ntwo\tthree"\tno\n')
    assert load_rows(source) == [{"premise": 'a "b"', "label": "yes"}, {"premise": "one\ntwo\tthree", "label": "no"}]
    source = write(tmp_path / "b.tsv", 'premise\tlabel\r\n"a ""b"""\tyes\r\n')
    assert load_rows(source) == [{"premise": 'a "b"', "label": "yes"}]


def test_a_file_is_found_under_the_root(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "x"}')
    assert load_rows("a.jsonl", str(tmp_path)) == [{"text": "x"}]
    refused("b.jsonl", "b.jsonl", str(tmp_path), root=str(tmp_path))


def test_a_malformed_row_is_named_by_file_and_line(tmp_path: pathlib.Path) -> None:
    refused(write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": \n'), "a.jsonl line 2", "not JSON")
    refused(write(tmp_path / "b.jsonl", '{"text": "x"}\n\n"text"\n'), "b.jsonl line 3", "object", "str")
    refused(write(tmp_path / "c.csv", "a,b\n1,2\n1,2,3\n"), "c.csv line 3", "expected 2 columns (a, b)", "found 3")
    refused(write(tmp_path / "d.csv", "a,b\n1\n"), "d.csv line 2", "found 1")
    refused(write(tmp_path / "e.csv", 'a,b\n1,"2\n'), "e.csv line 2")
    refused(write(tmp_path / "f.csv", "a,a\n1,2\n"), "f.csv line 1", "distinct")
    refused(write(tmp_path / "g.json", '[{"text": "x"},\n 3]'), "g.json row 2", "int")
    refused(write(tmp_path / "h.json", '[{"text": "x"},\n'), "h.json line 2")
    refused(write(tmp_path / "i.jsonl", '{"text": \n{"text": "x"}\n'), "i.jsonl line 1", "at column 9")
    refused(write(tmp_path / "j.jsonl", '{"text": "x\n'), "j.jsonl line 1", "(Unterminated string at column 10)")
    refused(write(tmp_path / "k.jsonl", '{"text": ' + "[" * 100_000), "k.jsonl line 1", "cannot be read")
    refused(write(tmp_path / "l.jsonl", '{"text": ' + "1" * 5000 + "}"), "l.jsonl line 1", "cannot be read")
    refused(write(tmp_path / "m.json", '[{"text": ' + "1" * 5000 + "}]"), "m.json", "cannot be read")


def test_what_is_no_readable_file_is_refused(tmp_path: pathlib.Path) -> None:
    refused(str(tmp_path), "folder")
    refused("", "is empty")
    refused(str(tmp_path / "missing.jsonl"), "missing.jsonl", "no such file")
    refused("icd11", "icd11", "no such file", "owner/name")
    refused(write(tmp_path / "a.xyz", "x"), "a.xyz", ".jsonl")
    refused(write(tmp_path / "empty.jsonl", "\n"), "empty.jsonl", "no rows")
    refused(write(tmp_path / "header.csv", "a,b\n"), "header.csv", "no rows")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    refused(str(tmp_path / "latin.jsonl"), "latin.jsonl", "UTF-8")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    refused(str(tmp_path / "cut.jsonl.gz"), "cut.jsonl.gz")
    pytest.importorskip("pyarrow")
    refused(write(tmp_path / "bad.parquet", "no parquet"), "bad.parquet")


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: pathlib.Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("efx_jax.data.corpora._open_text", closed)
    refused(write(tmp_path / "a.jsonl", '{"text": "x"}\n'), "a.jsonl: cannot be read: Permission denied", "permissions")


def test_an_unreachable_hub_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(
        name: str, config: str | None, *, data_files: str, split: str, revision: None, streaming: bool
    ) -> None:
        raise ConnectionError(f"cannot reach\n{name} {config} {data_files} {split}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused("someone/corpus", "someone/corpus None None train", "network")
    refused("someone/corpus:test", "someone/corpus None None test")
    refused("someone/corpus:en:test", "someone/corpus en None test")
    refused("c4", "allenai/c4 None en/c4-train.00000-of-01024.json.gz train")


def test_classes_of_a_hub_data_set_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    held = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=kinds)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: held)
    assert [row["label"] for row in load_rows("someone/questions")] == ["yes", "no", -1]


def test_the_standard_library_is_enough_for_text_files() -> None:
    source = pathlib.Path(load_rows.__code__.co_filename).read_text()
    assert not re.findall(r"^(?:import|from) (?:datasets|pyarrow|pandas)", source, re.MULTILINE)


def test_a_text_has_a_document_between_blank_lines(tmp_path: pathlib.Path) -> None:
    text = " = Title = \n \n First line ,\n second line .\n\n\n\nLast"
    documents = [{"text": " = Title = "}, {"text": " First line ,\n second line ."}, {"text": "Last"}]
    assert load_rows(write(tmp_path / "a.raw", text)) == documents
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    assert load_rows(str(tmp_path / "a.txt.gz")) == documents
    refused(write(tmp_path / "b.txt", " \n\n"), "b.txt", "no rows")


def test_a_corpus_known_by_name_lies_under_the_root_or_on_the_hub(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    lines = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": " One .\n"}, {"text": " Two .\n"}]
    asked = []

    def load_dataset(name: str, config: str | None, **options: object) -> list[dict]:
        asked.append((name, config, options["data_files"], options["split"], options["streaming"]))
        return lines if "wikitext" in name else [{"text": str(row)} for row in range(400)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("wikitext") == [{"text": " = Title = "}, {"text": " One .\n Two ."}]
    assert len(load_rows("multilegalpile")) == 300
    assert asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", False)
    assert asked[1][0] == "json" and asked[1][2].endswith("/Multi_Legal_Pile/data/en/legislation/*.jsonl.xz")
    assert asked[1][3:] == ("train", True)
    (tmp_path / "text_general").mkdir()
    write(tmp_path / "text_general/wiki.test.raw", "\n = Title = \n\n One .\n Two .\n")
    (tmp_path / "text_general/c4-sample.00000-of-00001.json.gz").write_bytes(gzip.compress(b'{"text": "page"}\n'))
    assert load_rows("wikitext", str(tmp_path)) == load_rows("wikitext")
    assert load_rows("c4", str(tmp_path)) == [{"text": "page"}]
    assert len(asked) == 3


def test_of_a_corpus_of_hundreds_of_thousands_of_documents_the_beginning_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = CORPORA["c4"]
    assert corpus.hub.first == 50_000 and not corpus.hub.streams
    monkeypatch.setitem(CORPORA, "c4", dataclasses.replace(corpus, hub=dataclasses.replace(corpus.hub, first=3)))
    path = tmp_path / corpus.file
    path.parent.mkdir()
    pages = [{"text": f"page {number}"} for number in range(3)]
    # The line behind the last that is asked for is never looked at.
    path.write_bytes(gzip.compress("\n".join([*map(json.dumps, pages), "{"]).encode()))
    assert load_rows("c4", str(tmp_path)) == pages
    refused(str(path), "line 4", "not JSON")


def test_a_folder_does_not_hide_a_corpus_known_by_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert corpora._find("wikitext", "") is CORPORA["wikitext"]
    refused("mine", "is a folder")
