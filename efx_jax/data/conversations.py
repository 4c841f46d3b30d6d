"""Rows that are conversations: every answer of the assistant, with everything said before it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from efx_jax.data.records import has_surrogate
from efx_jax.errors import InputError

COLUMNS = ("messages", "conversations")
"""The column's name in the chat-model format and in ShareGPT's."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


def conversation_of(row: Mapping[str, Any], where: str) -> list[Turn] | None:
    """The turns of a row's conversation, or None if the row has no such column.

    Args:
        row: has `messages`, a list of `{"role", "content"}`, or `conversations`, a list of `{"from", "value"}`; roles
            are system (first only), then user (or human) and assistant (or gpt) alternating, ending with assistant.
        where: file and row.

    Raises:
        InputError: roles in another order, an unknown role, or a message without text.
    """
    column = next((name for name in COLUMNS if isinstance(row.get(name), Sequence | Mapping)), None)
    if column is None or isinstance(row[column], str):
        return None
    turns = [_turn(message, f"{where}: {column} {number}") for number, message in enumerate(row[column], start=1)]
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or len(talk) % 2 or talk != ["user", "assistant"] * (len(talk) // 2):
        raise InputError(
            f"{where}: expected {column} of user and assistant in turn, to an assistant's answer, behind at most one "
            f"of system; found {', '.join(roles) or 'none'}; repair or remove the row"
        )
    return turns


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected a role and a content, found {type(message).__name__}; repair the row")
    role, content = (_first(message, names) for names in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(
            f"{where}: expected a role among {', '.join(_ROLES)}, found {role!r}; repair or remove the row"
        )
    if not isinstance(content, str) or not content.strip():
        found = "no text" if not content or isinstance(content, str) else f"a {type(content).__name__}"
        raise InputError(f"{where}: expected text as content, found {found}; repair or remove the row")
    if has_surrogate(content):
        raise InputError(f"{where}: holds half of a surrogate pair; expected valid Unicode; repair it")
    return Turn(_ROLES[role], content)


def _first(message: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first value that is not None: in data sets that were joined, the other format's columns are empty."""
    return next((message[name] for name in names if message.get(name) is not None), None)
