"""Frames around prompts: none but the instruction, the Alpaca one, or the tokenizer's chat template."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Literal

from efx_jax.data.conversations import Turn
from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import Tokenizer
from efx_jax.errors import InputError, first_line

Format = Literal["plain", "alpaca", "chat"]

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
