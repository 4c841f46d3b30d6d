"""One row of a task's official files, checked: texts by field name, and the answer."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from efx_jax.errors import InputError

NLI_LABELS = ("entailment", "contradiction", "neutral")
# Half of a UTF-16 surrogate pair; a regex search for speed, since a corpus has some hundred million characters.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Record:
    """One question of a task.

    `fields` are the texts that the prompt is written from, `answer` is a label of the task or free text, `origin` says
    where the row came from, and `number` is the data set's own identifier of the row, if it has one.
    """

    fields: dict[str, str]
    answer: str
    origin: str
    number: str = ""


def take_text(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a key, without surrounding blanks.

    Raises:
        InputError: the key is missing, or its value is not a text or is empty.
    """
    if key not in row:
        raise InputError(f"{where}: no {key!r}; expected it beside {_names(row)}; is this the official file?")
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is {_kind(value)}; expected a text; repair or remove the row")
    if not value.strip():
        raise InputError(f"{where}: {key!r} is empty; expected a text; repair or remove the row")
    if has_surrogate(value):
        raise InputError(f"{where}: {key!r} holds half of a surrogate pair; expected valid Unicode; repair it")
    return value.strip()


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which UTF-8 cannot encode."""
    return _SURROGATE.search(text) is not None


def take_texts(row: Mapping[str, Any], key: str, where: str) -> list[str]:
    """The texts of a key that holds a list of them; empty ones are left out.

    Raises:
        InputError: the key is missing, or does not hold a list of texts.
    """
    texts = row.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found = _kind(texts) if key in row else f"only {_names(row)}"
        raise InputError(f"{where}: expected a list of texts {key!r}, found {found}; is this the official file?")
    return [take_text({key: text}, key, where) for text in texts if text.strip()]


def take_label(row: Mapping[str, Any], key: str, where: str, labels: Mapping[Any, str]) -> str:
    """The answer that the label of a key stands for.

    Args:
        row: the row.
        key: the key that holds the label.
        where: file and row.
        labels: answer by label.

    Raises:
        InputError: the key is missing, or its label is not in `labels`.
    """
    if key not in row:
        raise InputError(f"{where}: no {key!r}; expected it beside {_names(row)}; is this the official file?")
    label = row[key].strip() if isinstance(row[key], str) else row[key]
    if not isinstance(label, str | int) or label not in labels:
        known = ", ".join(map(repr, labels))
        raise InputError(f"{where}: {key} {label!r} is no label; expected one of {known}; repair or remove the row")
    return labels[label]


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object that makes up a file.

    Raises:
        InputError: not readable as JSON, or not an object (with the line).
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not JSON ({json_fault(error)}); is the file complete?"
        ) from error
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text: {error}; fetch the file again") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: JSON that cannot be read ({error}); fetch the file again") from error
    return require_object(tree, str(path))


def json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong with a line of JSON, and in which column."""
    return f"{error.msg.removesuffix(' starting at')} at column {error.colno}"


def require_object(value: Any, where: str, fix: str = "is this the official file?") -> dict[str, Any]:
    """The value unchanged if it is a JSON object.

    Args:
        value: what was read.
        where: file and row.
        fix: how the message ends.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {_kind(value)}; {fix}")
    return value


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _names(row: Mapping[str, Any]) -> str:
    names = [str(name) for name in row]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "other keys"
