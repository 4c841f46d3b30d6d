"""Rows of a data set -> examples: a prompt that is given and a response that is learned."""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from efx_jax.data.tokenizer import Tokenizer
from efx_jax.errors import InputError

Format = Literal["plain", "alpaca", "chat"]

_ARROW = "=>"
# The public wording of the Alpaca instruction frame (paper, appendix H).
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One training or evaluation row.

    `prompt` may be empty (plain text); `response` includes the space or line break that separates it from the prompt.
    `origin` says where the row came from ("train.jsonl row 17") for error messages and takes no part in comparisons.
    """

    prompt: str
    response: str
    origin: str = dataclasses.field(default="", compare=False)


def examples_from_rows(rows: Sequence[Mapping[str, Any]], source: str, template: str = "") -> list[Example]:
    """Turns rows into examples.

    With a template such as "Question: {question}\\nAnswer: => {answer}" the part after "=>" is the response; one space
    just before the arrow is dropped, so that the response carries the separator (here " {answer}"), which is where
    tokenizers split. Without a template, rows have columns `prompt` and `response`, or `text` (prompt "").

    Args:
        rows: dictionaries of one data set.
        source: its name, for messages.
        template: the template, or "".

    Returns:
        One example per row.

    Raises:
        InputError: a template without arrow, an unknown or missing column, an empty response or text (with the row).
    """
    parts = _parse_template(template) if template else None
    examples = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        if parts is not None:
            prompt, response = (_fill(part, row, where) for part in parts)
        elif "prompt" in row and "response" in row:
            prompt, response = (_column(row, name, where) for name in ("prompt", "response"))
        else:
            prompt, response = "", _column(row, "text", where)
        if not response.strip():
            kind = "response" if prompt else "text"
            raise InputError(f"{where}: the {kind} is empty; expected some text; remove or complete the row")
        examples.append(Example(prompt, response, where))
    return examples


def apply_format(examples: Sequence[Example], style: Format, tokenizer: Tokenizer | None = None) -> list[Example]:
    """Puts every prompt into a frame; examples without a prompt (plain text) stay as they are.

    Args:
        examples: examples with bare prompts.
        style: "plain" (no frame), "alpaca" (the Alpaca instruction frame of the paper's appendix H) or "chat" (one
            user turn in the tokenizer's chat template, up to where the assistant starts).
        tokenizer: needed for "chat".

    Returns:
        Framed examples. In a frame the response starts its own line, so its leading blanks are dropped.

    Raises:
        InputError: "chat" with a tokenizer that has no chat template.
    """
    if style == "plain":
        return list(examples)
    return [
        dataclasses.replace(example, prompt=_frame(example, style, tokenizer), response=example.response.lstrip())
        if example.prompt
        else example
        for example in examples
    ]


def plain_text(examples: Sequence[Example]) -> list[str]:
    """Prompt and response of every example, joined: the text that perplexity is measured on."""
    return [example.prompt + example.response for example in examples]


def _frame(example: Example, style: Format, tokenizer: Tokenizer | None) -> str:
    if style == "alpaca":
        return _ALPACA.format(prompt=example.prompt.strip())
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError("data.format chat: the tokenizer has no chat template; expected one; use plain or alpaca")
    turns = [{"role": "user", "content": example.prompt.strip()}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _parse_template(template: str) -> tuple[str, str]:
    prompt, arrow, response = template.partition(_ARROW)
    if not arrow or not response.strip():
        raise InputError(
            f'data.template {template!r}: expected "=>" before the response, such as '
            '"Question: {question}\\nAnswer: => {answer}"'
        )
    try:
        list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"data.template {template!r}: {error}; write {{{{ and }}}} for braces") from error
    return prompt.removesuffix(" "), response


def _fill(part: str, row: Mapping[str, Any], where: str) -> str:
    """Fills {column} fields only: no attribute access, no format specification, so a template cannot do more."""
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(part):
        pieces.append(literal)
        if name is not None:
            pieces.append(_column(row, name, where))
    return "".join(pieces)


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise InputError(f"{where}: no column {name!r}; found {', '.join(map(str, row))}; set data.template")
    value = row[name]
    if value is None:
        raise InputError(f"{where}: column {name!r} is empty; expected text; remove or complete the row")
    if isinstance(value, list | dict):
        raise InputError(f"{where}: column {name!r} holds a {type(value).__name__}; expected text; flatten the column")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: column {name!r} holds half of a surrogate pair; expected valid Unicode; repair it")
    return text
