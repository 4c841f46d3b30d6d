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
# Some templates (LLaMA 3.2's, for one) write today's date into a prompt, so that a run could not be resumed the next
# day and evaluations could not be compared. This is the date that the template itself uses without a clock.
_CLOCK, _DAY = "strftime_now", datetime.datetime(2024, 7, 26)
# What Qwen3's template writes with enable_thinking=False.
_THOUGHT, _NO_THOUGHT = "<think>", "\n\n</think>\n\n"


def apply_format(examples: Sequence[Example], style: Format, tokenizer: Tokenizer | None = None) -> list[Example]:
    """Puts every prompt into a frame; examples without a prompt (plain text) are left unchanged.

    Args:
        examples: examples with bare prompts.
        style: "plain" (no frame except, for examples with an instruction, the instruction above and "Answer:" below),
            "alpaca" (the Alpaca instruction frame of the paper's appendix H) or "chat" (one user turn, after the
            earlier turns of a conversation, in the tokenizer's chat template, up to where the assistant starts; if the
            template can think (Qwen3's) or always thinks (DeepSeek-R1's), the thought is empty; its date is always
            26 July 2024).
        tokenizer: needed for "chat".

    Returns:
        Framed examples, whose prompt is the whole input. In a frame the response starts its own line, so its leading
        blanks are dropped. In "chat" it ends with the token that ends a turn in the template.

    Raises:
        InputError: "chat" with a tokenizer that has no chat template, or whose template fails or changes the text of a
            turn; a conversation of several turns in another format.
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
        # Some templates open a thought whatever the arguments: the answer must come after it, not inside it.
        after = f"{after.rstrip()}{_NO_THOUGHT}"
    return before + asked, after


def _turn_end(tokenizer: Tokenizer) -> str:
    """The special token with which the chat template ends an answer; "" if there is none or it is the EOS token.

    A base model's EOS token is often a different one (Qwen's `<|endoftext|>`, not `<|im_end|>`).
    """
    try:
        _, found, rest = _chat_turn("ask", tokenizer, "told").rpartition("told")
    except InputError:
        return ""
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"][:1] if found and rest.strip() else []
    (token,) = tokenizer.convert_ids_to_tokens(ids) or [""]
    return "" if ids == [tokenizer.eos_token_id] or token not in tokenizer.get_added_vocab() else str(token)


def _chat_turn(text: str, tokenizer: Tokenizer, answer: str = "", earlier: Sequence[Turn] = ()) -> str:
    """A user's turn after the earlier ones, then the answer or else just its opening; the same text on any day."""
    said = [*earlier, Turn("user", text), *([Turn("assistant", answer)] if answer else [])]
    turns = [dataclasses.asdict(turn) for turn in said]
    try:
        template = tokenizer.get_chat_template()
        if _CLOCK in template:
            template = _stopped_clock() + template
        framed = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=not answer, enable_thinking=False
        )
    # A template is third-party code and may fail in any way.
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"data.format chat: the tokenizer's chat template fails ({reason}); expected one that takes "
            f"{', '.join(turn.role for turn in said)}; use plain or alpaca"
        ) from error
    return str(framed)


def _stopped_clock() -> str:
    """A macro that replaces the clock function which transformers gives templates; it accepts no other function."""
    signs = {sign: _DAY.strftime(f"%{sign}") for sign in "aAbBdmyYHIMSpj"}
    # Unpadded forms, as Linux writes them.
    signs |= {f"-{sign}": str(int(signs[sign])) for sign in "dmyHIMSj"} | {"e": f"{_DAY.day:2d}"}
    steps = "".join(f"|replace('%{sign}', '{text}')" for sign, text in signs.items())
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"
