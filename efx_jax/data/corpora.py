"""Rows of a local file or of a data set on the Hugging Face Hub, as plain dictionaries."""

import csv
import dataclasses
import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from efx_jax.data.hub import HubTable, read_hub
from efx_jax.data.records import json_fault, require_object
from efx_jax.errors import InputError, MissingInputError
from efx_jax.hub_name import hub_name

_JSON = (".jsonl", ".json", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_TEXTS = (".txt", ".raw")
_SUPPORTED = (*_JSON, *_TABLES, *_TEXTS, ".parquet")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text known by a short name: its file under the root if there is one, else its table on the Hub.

    At most `hub.first` rows of either are read. `lines`: whether each row of that table is a line of a text file.
    """

    file: str
    hub: HubTable
    lines: bool = False


# C4: the shard that Wanda and the authors' code calibrate on; the first 50,000 of its 356,317 documents (some 24
# million tokens, about 150 MB) are more than calibration or a teacher needs. WikiText-2: the test set. MultiLegalPile:
# the first 300 documents of "en_legislation", as the authors use, from the data set's own files (its loader, a script
# that is not run, appends others).
_LEGISLATION = "hf://datasets/joelniklaus/Multi_Legal_Pile/data/en/legislation/*.jsonl.xz"
CORPORA = {
    "c4": Corpus(
        "text_general/c4-sample.00000-of-00001.json.gz",
        HubTable("allenai/c4", file="en/c4-train.00000-of-01024.json.gz", first=50_000),
    ),
    "wikitext": Corpus(
        "text_general/wiki.test.raw", HubTable("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), lines=True
    ),
    "multilegalpile": Corpus(
        "text_legal/multilegalpile.jsonl", HubTable("json", file=_LEGISLATION, first=300, streams=True)
    ),
}
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_EACH_ROW = 'write each row as {"text": "..."}, or with the columns of your template'
_LONGEST_FIELD = 2**31 - 1  # characters; the csv module refuses documents above 131,072 by default


def load_rows(source: str, root: str = "") -> list[dict[str, Any]]:
    """Reads every row of a data set.

    JSON lines, JSON arrays, CSV, TSV and texts (plain or `.gz`) need only the standard library; Parquet needs pyarrow,
    and a Hub name needs `datasets`. A text (`.txt`, `.raw`) gives one row with column `text` per document; blank lines
    separate documents.

    Args:
        source: a file, a Hub name `owner/name`, `owner/name:split` or `owner/name:config:split` (split "train";
            `owner/name@revision` names a branch, a tag or a commit), or a corpus known by name: "c4" (the
            first 50,000 documents of its first training file), "wikitext" (the test set of WikiText-2) or
            "multilegalpile" (300 documents).
        root: a second folder in which a relative file name is looked up.

    Returns:
        One dictionary per row, in file order; row i of the file is element i - 1.

    Raises:
        InputError: `source` is a folder, an unknown kind of file, a missing file or a Hub name that cannot be read, or
            it has a malformed row (named by file and line) or no rows at all.
    """
    found = _find(source, root)
    if isinstance(found, pathlib.Path):
        rows = _file_rows(found)
    elif isinstance(found, Corpus):
        rows = _corpus_rows(found, root)
    else:
        rows = _without_blank(read_hub(found, names_labels=True))
    if not rows:
        raise InputError(f"{source}: no rows found; expected at least one; check that the file is complete")
    return rows


def _find(source: str, root: str) -> pathlib.Path | Corpus | HubTable:
    """What `source` names: a file if it exists, a corpus known by name, or a table on the Hub."""
    if not source:
        raise InputError("data: the name of a data set is empty; expected a file or a Hub name; set data.train")
    candidates = [pathlib.Path(source).expanduser(), *([pathlib.Path(root).expanduser() / source] if root else [])]
    for path in candidates:
        if path.is_dir() and source not in CORPORA:
            raise InputError(f"{path}: is a folder; expected a {', '.join(_SUPPORTED)} file; name one file inside it")
        if path.is_file():
            return path
    found = None if _kind(candidates[0]) in _SUPPORTED else CORPORA.get(source) or _hub_table(source)
    if found is None:
        where = f" (nor in {root})" if root else ""
        raise MissingInputError(
            f"{source}: no such file{where}; expected a file or a Hub name owner/name; check the path or set data.root"
        )
    return found


def _kind(path: pathlib.Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return pathlib.PurePath(name).suffix


def _file_rows(path: pathlib.Path, first: int = 0) -> list[dict[str, Any]]:
    """The rows of a file, or only the `first` ones; the rest is not read if the file format allows that."""
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet_rows(path)[: first or None]
    if kind not in _SUPPORTED:
        raise InputError(f"{path}: cannot read {kind or 'a file without suffix'}; expected {', '.join(_SUPPORTED)}")
    try:
        with _open_text(path) as stream:
            if kind in _TEXTS:
                rows = _text_rows(stream)
            else:
                rows = _json_rows(stream, path) if kind in _JSON else _table_rows(stream, path, _TABLES[kind])
            return list(itertools.islice(rows, first or None))
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; check its permissions") from error


def _open_text(path: pathlib.Path) -> TextIO:
    # utf-8-sig: spreadsheets prepend a byte order mark, which would become part of the first column's name.
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _text_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The documents, separated by blank lines, without their trailing line break."""
    document: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            document.append(line.rstrip("\r\n"))
        elif document:
            yield {"text": "\n".join(document)}
            document = []


def _json_rows(stream: TextIO, path: pathlib.Path) -> Iterator[dict[str, Any]]:
    while (first := stream.read(1)).isspace():
        pass
    stream.seek(0)
    if first == "[":
        yield from _json_array(stream, path)
        return
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            # Without the trailing line break, which would shift the position that an error message reports.
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number}: not JSON ({json_fault(error)}); repair it") from error
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path} line {number}: JSON that cannot be read ({error}); repair the row") from error
        yield require_object(row, f"{path} line {number}", _EACH_ROW)


def _json_array(stream: TextIO, path: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.load(stream)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno}: not JSON ({json_fault(error)}); repair it") from error
    except UnicodeDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: JSON that cannot be read ({error}); repair the file") from error
    for number, row in enumerate(rows, start=1):
        yield require_object(row, f"{path} row {number}", _EACH_ROW)


def _table_rows(stream: TextIO, path: pathlib.Path, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    lines = list(stream) if delimiter == "\t" else None
    reader = csv.reader(
        stream if lines is None else lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if lines is None or _is_quoted(lines) else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        header = next(reader, [])
        if len(set(header)) != len(header) or "" in header:
            raise InputError(
                f"{path} line 1: the header needs one distinct name per column, found {header}; name each (pandas "
                "writes a nameless column of row numbers unless told index=False)"
            )
        for values in reader:
            if values and len(values) != len(header):
                raise InputError(
                    f"{path} line {reader.line_num}: expected {len(header)} columns ({', '.join(header)}), "
                    f"found {len(values)}; quote values that contain {delimiter!r}"
                )
            if values:
                yield dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: malformed row: {error}") from error


def _is_quoted(lines: Sequence[str]) -> bool:
    """Whether quotes in a .tsv file enclose its values, as in .csv files, or belong to a text that begins with one.

    They belong to the text if splitting on tabs and line ends alone gives every line the right number of columns, and
    some value begins with a quote that is not closed at its end.
    """
    rows = [line.rstrip("\r\n").split("\t") for line in lines if line.strip()]
    if any(len(row) != len(rows[0]) for row in rows):
        return True
    return all(_QUOTED.fullmatch(value) for row in rows for value in row if value.startswith('"'))


def _parquet_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow; run: pip install pyarrow") from error
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_one_line(error)}") from error
    return rows


def _corpus_rows(corpus: Corpus, root: str) -> list[dict[str, Any]]:
    path = pathlib.Path(root).expanduser() / corpus.file
    if root and path.is_file():
        return _file_rows(path, corpus.hub.first)
    rows = read_hub(corpus.hub)
    if corpus.lines:
        return list(_text_rows(row["text"] for row in rows))
    return _without_blank(rows)


def _without_blank(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows from the Hub without those whose text is blank (every other row of WikiText): no user can repair them."""
    return [row for row in rows if not isinstance(row.get("text"), str) or row["text"].strip()]


def _hub_table(source: str) -> HubTable | None:
    """The table that `owner/name[@revision][:config][:split]` names, or None if `source` does not have that form."""
    found, *rest = source.split(":")
    name = hub_name(found)
    if name is None or not name.has_owner or len(rest) > 2 or "" in rest:
        return None
    config, split = (rest[0] if len(rest) > 1 else ""), (rest[-1] if rest else "train")
    return HubTable(name.repository, config, split, name.revision)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
