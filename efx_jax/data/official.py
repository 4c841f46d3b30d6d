"""From a task's official files, or its table on the Hub, to examples."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efx_jax.data.hub import HubTable, read_hub
from efx_jax.data.overlap import fingerprint
from efx_jax.data.prompts import Example, Side, write_fields
from efx_jax.data.records import Record
from efx_jax.errors import InputError, MissingInputError

_LABEL_TOKENS = 10  # the authors' own limit


@dataclasses.dataclass(frozen=True)
class Split:
    """Where the rows of one split are.

    `files`: the files that are read together, each with the names that it may have, relative to the task's folder;
    `read` gets them in this order. If a public table on the Hub has the same rows, `hub` names it and `parse` reads it.
    """

    files: tuple[tuple[str, ...], ...]
    read: Callable[[Sequence[pathlib.Path]], list[Record]]
    hub: HubTable | None = None
    parse: Callable[[Sequence[Mapping[str, Any]], str], list[Record]] | None = None


@dataclasses.dataclass(frozen=True)
class Official:
    """One of the paper's tasks.

    `folders`: names that its folder under the root may have. `labels`: the answers to choose from, () for free text.
    `fields`: (heading, field of the record) in prompt order; `context` is the heading of the field that may be
    shortened, at the side `cut`.
    `identity`: groups of fields, each group identifying a row by itself ("answer" is the answer). `source`: where the
    files come from.
    """

    name: str
    folders: tuple[str, ...]
    labels: tuple[str, ...]
    instruction: str
    fields: tuple[tuple[str, str], ...]
    context: str
    identity: tuple[tuple[str, ...], ...]
    splits: Mapping[str, Split]
    source: str
    new_tokens: int = _LABEL_TOKENS
    cut: Side = "end"
    note: str = ""


def load_official(task: Official, split: str, root: str) -> list[Example]:
    """Reads a split of a task: from its folder under the root if there is one, else from the Hub.

    Args:
        task: the task.
        split: "train", "test" or another of its splits.
        root: folder of the official files; "" for none.

    Returns:
        The rows as examples whose prompt is only the input, without the task's instruction; the response is " " plus
        the answer.

    Raises:
        InputError: a split that the task does not have, a missing file, a malformed row, or no such table on the Hub.
    """
    if split not in task.splits:
        raise InputError(f"{task.name}: no split {split!r}; expected one of {', '.join(task.splits)}")
    part = task.splits[split]
    folders = [pathlib.Path(root).expanduser() / name for name in task.folders] if root else []
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is not None:
        records = part.read([_find(task, folder, names) for names in part.files])
    elif part.hub is not None and part.parse is not None:
        records = part.parse(read_hub(part.hub), f"{part.hub.name} {part.hub.split}")
    else:
        expected = " and ".join(" or ".join(names) for names in part.files)
        raise MissingInputError(
            f"{task.name}: no folder {' or '.join(task.folders)} under {root or 'data.root, which is not set'}; "
            f"expected {expected} in it, and no public table has this split; {task.source}"
        )
    if not records:
        raise InputError(f"{task.name} {split}: no rows found; expected at least one; are the files complete?")
    return [_example(task, record) for record in records]


def _find(task: Official, folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise MissingInputError(f"{task.name}: expected {' or '.join(names)} in {folder}, found none; {task.source}")


def _example(task: Official, record: Record) -> Example:
    headed = [(heading, record.fields[name]) for heading, name in task.fields]
    prompt, context = write_fields(headed, task.context)
    texts = record.fields | {"answer": record.answer}
    keys = [fingerprint(*(texts[name] for name in group)) for group in task.identity]
    if record.number:
        keys.append(f"{task.name} {record.number}")
    return Example(prompt, f" {record.answer}", record.origin, context, task.cut, task.instruction, tuple(keys))
