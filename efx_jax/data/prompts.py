"""Rows of a data set -> examples: a prompt that is given and a response that is learned."""

import dataclasses
import datetime
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from efx_jax.config_values import nearest
from efx_jax.data.conversations import Turn, conversation_of
from efx_jax.data.records import has_surrogate
from efx_jax.data.tokenizer import Tokenizer
from efx_jax.errors import InputError, first_line

Format = Literal["plain", "alpaca", "chat"]
Span = tuple[int, int]
Side = Literal["beginning", "end"]

_ARROW = "=>"
# The public wording of the two Alpaca instruction frames (paper, appendix H), up to the instruction.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_ALPACA_END = "\n\n### Response:\n"
_PLAIN_END = "\n\nAnswer:"
# LLaMA 3.2's template, for one, writes today's date into a prompt: a run could not be resumed on the next day, nor two
# evaluations be compared. This is the date that the template itself takes where there is no clock.
_CLOCK, _DAY = "strftime_now", datetime.datetime(2024, 7, 26)
# What Qwen3's template writes with enable_thinking=False.
_THOUGHT, _NO_THOUGHT = "<think>", "\n\n</think>\n\n"


@dataclasses.dataclass(frozen=True)
class Example:
    """One training or evaluation row.

    `prompt` may be empty (plain text); `response` includes the space or line break that separates it from the prompt.
    `context` is the span of the prompt, in characters, that may be shortened, at the side `cut`; (0, 0) where nothing
    may. `instruction` is what a task of ours asks, while the prompt is only its input: `apply_format` joins the two.
    `end` is the token that ends the response, "" the tokenizer's end of sequence.
    `origin` says where the row came from ("train.jsonl row 17") for error messages, and `keys` are fingerprints of what
    no training row may share with a test row; neither takes part in comparisons.
    `turns` are what a conversation has before the prompt, its user's last turn; only "chat" can say them.
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
    tokenizers split. A backslash and n or t, as shells pass them, are a line break or a tab. Without a template, rows
    have columns `prompt` and `response`, a conversation (`conversation_of`), or `text` (prompt "").

    Args:
        rows: dictionaries of one data set.
        source: its name, for messages.
        template: the template, or "".
        context: the column that may be shortened: one of the template's prompt, or "prompt" without a template; or "".

    Returns:
        One example per row, and of a conversation one per answer.

    Raises:
        InputError: a template without arrow, an unknown or missing column, an empty response or text (with the row).
    """
    parts = _parse_template(template) if template else None
    _check_context(parts[0] if parts else "{prompt}", context)
    examples = []
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        span = (0, 0)
        turns = conversation_of(row, where) if parts is None and not _is_pair(row) else None
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
    """Every answer of a conversation, behind the question before it and all earlier turns."""
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
    """What a prompt of `examples_from_rows` looks like: columns in braces, and "{prompt}" without a template.

    Raises:
        InputError: as `examples_from_rows` of the template.
    """
    if not template:
        return "{prompt}"
    parts = string.Formatter().parse(_parse_template(template)[0])
    return "".join(literal + ("" if name is None else f"{{{name}}}") for literal, name, _, _ in parts)


def write_fields(fields: Sequence[tuple[str, str]], context: str) -> tuple[str, Span]:
    """The input of a task: a line "Heading: text" per field.

    Args:
        fields: (heading, text) in the order of the prompt; a field without text is left out.
        context: heading of the field that may be shortened.

    Returns:
        The input, and the span in it of that field's text.
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


def apply_format(examples: Sequence[Example], style: Format, tokenizer: Tokenizer | None = None) -> list[Example]:
    """Puts every prompt into a frame; examples without a prompt (plain text) stay as they are.

    Args:
        examples: examples with bare prompts.
        style: "plain" (no frame but the instruction above and "Answer:" below, for examples that have an instruction),
            "alpaca" (the Alpaca instruction frame of the paper's appendix H) or "chat" (one user turn, behind the
            earlier turns of a conversation, in the tokenizer's chat template, up to where the assistant starts; where
            the template can think, as Qwen3's, or always does, as DeepSeek-R1's, the thought is an empty one; its date
            is always 26 July 2024).
        tokenizer: needed for "chat".

    Returns:
        Framed examples, whose prompt is all there is. In a frame the response starts its own line, so its leading
        blanks are dropped. In "chat" it ends with the token that ends a turn in the template.

    Raises:
        InputError: "chat" with a tokenizer that has no chat template, or one that fails or changes the text of a turn;
            a conversation of several turns in another format.
    """
    end = _turn_end(tokenizer) if style == "chat" and tokenizer is not None and tokenizer.chat_template else ""
    return [
        dataclasses.replace(_framed(example, style, tokenizer), end=end) if example.prompt else example
        for example in examples
    ]


def _framed(example: Example, style: Format, tokenizer: Tokenizer | None) -> Example:
    if example.turns and style != "chat":
        raise InputError(
            f"{example.origin}: a conversation of {len(example.turns) + 2} turns cannot be written in data.format "
            f"{style}; expected chat"
        )
    if style == "plain" and not example.instruction:
        return example
    body = example.prompt.strip()
    before, after = _frame(body, example.instruction, style, tokenizer, example.turns)
    shift = len(before) - (len(example.prompt) - len(example.prompt.lstrip()))
    end = len(before) + len(body)
    start, stop = (min(max(place + shift, len(before)), end) for place in example.context)
    return dataclasses.replace(
        example,
        prompt=before + body + after,
        response=example.response if style == "plain" else example.response.lstrip(),
        context=(start, stop) if start < stop else (0, 0),
        instruction="",
        turns=(),
    )


def _frame(
    body: str, instruction: str, style: Format, tokenizer: Tokenizer | None, turns: Sequence[Turn] = ()
) -> tuple[str, str]:
    """What comes before and after the body of a prompt."""
    if style == "alpaca":
        if instruction:
            return f"{_ALPACA_WITH_INPUT}{instruction}\n\n### Input:\n", _ALPACA_END
        return _ALPACA, _ALPACA_END
    asked = f"{instruction}\n\n" if instruction else ""
    if style == "plain":
        return asked, _PLAIN_END
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError("data.format chat: the tokenizer has no chat template; expected one; use plain or alpaca")
    before, found, after = _chat_turn(asked + body, tokenizer, earlier=turns).rpartition(asked + body)
    if not found:
        raise InputError(
            "data.format chat: the tokenizer's chat template changes the text of a turn; expected it to stay as it is; "
            "use plain or alpaca"
        )
    if after.rstrip().endswith(_THOUGHT):
        # Some templates open a thought whatever they are told: an answer has to come after it, not in it.
        after = f"{after.rstrip()}{_NO_THOUGHT}"
    return before + asked, after


def _turn_end(tokenizer: Tokenizer) -> str:
    """The special token by which the chat template ends an answer, "" if it is the end of sequence, or none.

    Of a base model the end of sequence is often another one (Qwen's `<|endoftext|>` beside `<|im_end|>`).
    """
    try:
        _, found, rest = _chat_turn("ask", tokenizer, "told").rpartition("told")
    except InputError:
        return ""
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"][:1] if found and rest.strip() else []
    (token,) = tokenizer.convert_ids_to_tokens(ids) or [""]
    return "" if ids == [tokenizer.eos_token_id] or token not in tokenizer.get_added_vocab() else str(token)


def _chat_turn(text: str, tokenizer: Tokenizer, answer: str = "", earlier: Sequence[Turn] = ()) -> str:
    """A user's turn behind the earlier ones, and the answer or else its beginning, the same on every day."""
    said = [*earlier, Turn("user", text), *([Turn("assistant", answer)] if answer else [])]
    turns = [dataclasses.asdict(turn) for turn in said]
    try:
        template = tokenizer.get_chat_template()
        if _CLOCK in template:
            template = _stopped_clock() + template
        framed = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=not answer, enable_thinking=False
        )
    # A template is a program of somebody else's, and may fail in any way.
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"data.format chat: the tokenizer's chat template fails ({reason}); expected one that takes "
            f"{', '.join(turn.role for turn in said)}; use plain or alpaca"
        ) from error
    return str(framed)


def _stopped_clock() -> str:
    """A macro in the place of the clock that transformers gives to templates: it lets no other function through."""
    signs = {sign: _DAY.strftime(f"%{sign}") for sign in "aAbBdmyYHIMSpj"}
    # Without the padding, as Linux writes them.
    signs |= {f"-{sign}": str(int(signs[sign])) for sign in "dmyHIMSj"} | {"e": f"{_DAY.day:2d}"}
    steps = "".join(f"|replace('%{sign}', '{text}')" for sign, text in signs.items())
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"


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
    """Whether a row is meant as a prompt and its response; one of the two alone is, where it is no text either."""
    pair = {"prompt", "response"}
    return row.keys() >= pair or ("text" not in row and bool(row.keys() & pair))


def _fill(
    part: str, row: Mapping[str, Any], where: str, context: str = "", is_answer: bool = False
) -> tuple[str, Span]:
    """Fills {column} fields only: no attribute access, no format specification, so a template cannot do more."""
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
