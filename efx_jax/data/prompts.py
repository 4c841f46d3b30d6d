"""Rows of a data set -> examples: a prompt that is given and a response that is learned."""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from efx_jax.config_values import nearest
from efx_jax.data.conversations import Turn, conversation_of
from efx_jax.data.records import has_surrogate
from efx_jax.errors import InputError

Span = tuple[int, int]
Side = Literal["beginning", "end"]

_ARROW = "=>"


@dataclasses.dataclass(frozen=True)
class Example:
    """One training or evaluation row.

    `prompt` may be empty (plain text); `response` includes the space or line break that separates it from the prompt.
    `context` is the span of the prompt, in characters, that may be shortened, at the side `cut`; (0, 0) if nothing may
    be. `instruction` is the instruction of a built-in task, whose prompt is only its input: `apply_format` joins them.
    `end` is the token that ends the response, "" for the tokenizer's end of sequence.
    `origin` says where the row came from ("train.jsonl row 17") for error messages, and `keys` are fingerprints of what
    no training row may share with a test row; neither takes part in comparisons.
    `turns` are the turns of a conversation before its last user turn; that turn is the prompt until "chat" puts all
    turns there.
    """

    prompt: str
    response: str
    origin: str = dataclasses.field(default="", compare=False)
    context: Span = (0, 0)
    cut: Side = "end"
    instruction: str = ""
    keys: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    end: str = ""
    turns: tuple[Turn, ...] = ()


def examples_from_rows(
    rows: Sequence[Mapping[str, Any]], source: str, template: str = "", context: str = ""
) -> list[Example]:
    """Turns rows into examples.

    With a template such as "Question: {question}\\nAnswer: => {answer}" the part after "=>" is the response; one space
    just before the arrow is dropped, so that the response carries the separator (here " {answer}"), which is where
    tokenizers split. A backslash followed by n or t, as shells pass them, means a line break or a tab. Without a
    template, rows have columns `prompt` and `response`, a conversation (`conversation_of`), or `text` (prompt "").

    Args:
        rows: dictionaries of one data set.
        source: its name, for messages.
        template: the template, or "".
        context: the column that may be shortened: one in the template's prompt, or "prompt" without a template; or "".

    Returns:
        One example per row; for a conversation, one per answer.

    Raises:
        InputError: a template without an arrow, an unknown or missing column, an empty response or text (with the row).
    """
    parts = _parse_template(template) if template else None
    _check_context(parts[0] if parts else "{prompt}", context)
    examples = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        span = (0, 0)
        # Some data sets also store the first question, or all turns as one text, next to the conversation.
        has_other = parts is not None or "text" in row or row.keys() >= {"prompt", "response"}
        turns = None if has_other else conversation_of(row, where)
        if turns is not None:
            examples += _answers(turns, where, bool(context))
            continue
        if parts is not None:
            prompt, span = _fill(parts[0], row, where, context)
            response, _ = _fill(parts[1], row, where, is_answer=True)
        elif _is_pair(row):
            prompt, response = (_column(row, name, where) for name in ("prompt", "response"))
            if not prompt.strip():
                raise InputError(f"{where}: the prompt is empty; expected some text; remove or complete the row")
            span = (0, len(prompt)) if context else span
        else:
            prompt, response = "", _column(row, "text", where)
        if not response.strip():
            kind = "response" if prompt else "text"
            raise InputError(f"{where}: the {kind} is empty; expected some text; remove or complete the row")
        examples.append(Example(prompt, response, where, span))
    return examples


def _answers(turns: Sequence[Turn], where: str, may_be_cut: bool) -> list[Example]:
    """Every answer of a conversation, each with the question before it and all earlier turns."""
    return [
        Example(
            turns[place - 1].content,
            f" {turns[place].content.lstrip()}",
            where,
            (0, len(turns[place - 1].content)) if may_be_cut else (0, 0),
            turns=tuple(turns[: place - 1]),
        )
        for place, turn in enumerate(turns)
        if turn.role == "assistant"
    ]


def prompt_pattern(template: str) -> str:
    """What a prompt of `examples_from_rows` looks like: columns in braces, or "{prompt}" without a template.

    Raises:
        InputError: what `examples_from_rows` raises for the template.
    """
    if not template:
        return "{prompt}"
    parts = string.Formatter().parse(_parse_template(template)[0])
    return "".join(literal + ("" if name is None else f"{{{name}}}") for literal, name, _, _ in parts)


def write_fields(fields: Sequence[tuple[str, str]], context: str) -> tuple[str, Span]:
    """The input of a task: a line "Heading: text" per field.

    Args:
        fields: (heading, text) in prompt order; a field without text is left out.
        context: heading of the field that may be shortened.

    Returns:
        The input, and the span of that field's text in it.
    """
    pieces, span, length = [], (0, 0), 0
    for heading, text in fields:
        if not text:
            continue
        piece = f"{heading}: {text}"
        if heading == context:
            span = (length + len(piece) - len(text), length + len(piece))
        pieces.append(piece)
        length += len(piece) + 1
    return "\n".join(pieces), span


def plain_text(examples: Sequence[Example]) -> list[str]:
    """Prompt and response of every example, joined: the text that perplexity is measured on."""
    return [example.prompt + example.response for example in examples]


def _parse_template(template: str) -> tuple[str, str]:
    template = template.replace("\\n", "\n").replace("\\t", "\t")
    prompt, arrow, response = template.partition(_ARROW)
    if not arrow or not response.strip():
        raise InputError(
            f'data.template {template!r}: expected "=>" before the response, such as '
            '"Question: {question}\\nAnswer: => {answer}"'
        )
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"data.template {template!r}: {error}; write {{{{ and }}}} for braces") from error
    for _, name, specification, conversion in fields:
        if specification or conversion:
            raise InputError(
                f"data.template {template!r}: expected the bare name of a column in braces, found a format behind "
                f"{name!r}; format the column itself"
            )
    return prompt.removesuffix(" "), response


def _check_context(prompt: str, context: str) -> None:
    columns = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    if context and columns.count(context) != 1:
        raise InputError(
            f"data.context {context!r}: expected a column that the prompt names once; found {', '.join(columns)}"
        )


def _is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is meant as a prompt and its response; one of the two is enough if there is no `text`."""
    pair = {"prompt", "response"}
    return row.keys() >= pair or ("text" not in row and bool(row.keys() & pair))


def _fill(
    part: str, row: Mapping[str, Any], where: str, context: str = "", is_answer: bool = False
) -> tuple[str, Span]:
    """Fills plain {column} fields only, without attribute access or format specifications."""
    filled, span = "", (0, 0)
    for literal, name, _, _ in string.Formatter().parse(part):
        filled += literal
        if name is not None:
            value = _column(row, name, where)
            if is_answer and not value.strip():
                raise _emptiness(name, where)
            span = (len(filled), len(filled) + len(value)) if name == context else span
            filled += value
    return filled, span


def _emptiness(name: str, where: str) -> InputError:
    return InputError(f"{where}: column {name!r} is empty; expected text; remove or complete the row")


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        columns = [str(column) for column in row]
        raise InputError(
            f"{where}: no column {name!r}; the nearest is {nearest(name, columns)}; found {', '.join(columns)}; set "
            "data.template"
        )
    value = row[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _emptiness(name, where)
    if isinstance(value, list | dict | bytes):
        raise InputError(f"{where}: column {name!r} holds a {type(value).__name__}; expected text; convert the column")
    text = str(value)
    if has_surrogate(text):
        raise InputError(f"{where}: column {name!r} holds half of a surrogate pair; expected valid Unicode; repair it")
    return text
