"""Text -> token ids with loss flags. Whether a token carries loss is decided here, never later from its id."""

import dataclasses
import itertools
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import Tokenizer, encode_continuations, encode_prompts, end_of
from efx_jax.errors import InputError

LossOn = Literal["response", "all"]
_SLACK = 64  # tokens read past a limit, so that none before it depends on unread text


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenized:
    """One sequence of n tokens: `tokens` int32 [n]; `loss` bool [n], True where predicting that token carries loss."""

    tokens: np.ndarray
    loss: np.ndarray


def tokenize(
    examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, loss_on: LossOn = "response"
) -> list[Tokenized]:
    """Tokenises every example as [BOS] prompt response end, where the end is EOS or the token that ends a chat turn.

    Prompt and response are tokenised separately, so that the response's first token is the same in training and in
    evaluation whatever the prompt ends with. BOS is present if the tokenizer adds one; the end follows every response
    that was not cut.

    Args:
        examples: the examples.
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens per sequence, the end included; longer responses are cut, and a warning counts them.
        loss_on: "response" (response and end) or "all" (every token but the first).

    Returns:
        One sequence per example, each with at least one token that carries loss.

    Raises:
        InputError: a prompt that leaves no room for a response, or a sequence without a token to predict.
    """
    prompts = encode_prompts([example.prompt for example in examples], tokenizer)
    answers = encode_continuations([example.response for example in examples], tokenizer)
    ends = {end: end_of(end, tokenizer) for end in {example.end for example in examples}}
    responses = [answer + ends[example.end] for answer, example in zip(answers, examples, strict=True)]
    named = [example.origin or f"example {number}" for number, example in enumerate(examples, start=1)]
    pairs = list(zip(prompts, responses, strict=True))
    rows = [
        _join(prompt, response, max_length, loss_on, name)
        for name, (prompt, response) in zip(named, pairs, strict=True)
    ]
    cut = [
        name for name, (prompt, response) in zip(named, pairs, strict=True) if len(prompt) + len(response) > max_length
    ]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(examples)} training rows lose the end of their response or text, which has no room in "
            f"data.max_length {max_length}; the first is {cut[0]}",
            stacklevel=2,
        )
    return rows


def checksum(sequences: Iterable[Tokenized]) -> str:
    """CRC-32 of all tokens and their loss flags, in order: eight hexadecimal digits."""
    value = 0
    for sequence in sequences:
        value = zlib.crc32(sequence.loss.tobytes(), zlib.crc32(sequence.tokens.tobytes(), value))
    return f"{value:08x}"


def text_windows(
    texts: Sequence[str], tokenizer: Tokenizer, window: int, limit: int = 0, name: str = "perplexity text"
) -> list[Tokenized]:
    """Cuts text into windows, for perplexity and also for calibration or a teacher.

    Convention (that of GPTQ, SparseGPT and Wanda, except that the remainder is kept): the texts are joined by blank
    lines and tokenised as one stream, with BOS at its start only where the tokenizer adds one; windows do not
    overlap; every token but the first of a window is predicted from the tokens before it in the same window. The last
    window is shorter, and dropped if it has a single token.

    Args:
        texts: the documents, in order.
        tokenizer: a Hugging Face tokenizer.
        window: tokens per window, at least 2.
        limit: maximum tokens of the stream; 0 takes all.
        name: the text's name, for an error message.

    Returns:
        The windows.

    Raises:
        InputError: fewer than 2 tokens of text, or `window` below 2.
    """
    if window < 2:
        raise InputError(f"eval.window: expected at least 2 tokens, found {window}")
    tokens = np.asarray(_stream(texts, tokenizer, limit), np.int32)
    pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    windows = [Tokenized(piece, np.arange(len(piece)) > 0) for piece in pieces if len(piece) > 1]
    if not windows:
        raise InputError(f"{name}: expected at least 2 tokens, found {len(tokens)}; give more text")
    return windows


def _stream(texts: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[int]:
    """The first `limit` tokens (0: all) of the texts as one document; not much more of a large corpus is read.

    An average token has about 4 characters. If the characters read give too few tokens, or end so close after the limit
    that the text after them might have changed a token before it, twice as many are read.
    """
    ends = list(itertools.accumulate(len(text) for text in texts))
    characters = 6 * (limit + _SLACK)
    while True:
        count = 1 + int(np.searchsorted(ends, characters)) if limit else len(texts)
        stream = encode_prompts(["\n\n".join(texts[:count])], tokenizer)[0]
        if count >= len(texts) or len(stream) >= limit + _SLACK:
            return stream[: limit or None]
        characters *= 2


def _join(prompt: list[int], response: list[int], max_length: int, loss_on: LossOn, where: str) -> Tokenized:
    if len(prompt) >= max_length:
        raise InputError(
            f"{where}: the prompt has {len(prompt)} tokens; expected fewer than data.max_length {max_length}; "
            "shorten the prompt or raise data.max_length"
        )
    tokens = np.asarray((prompt + response)[:max_length], np.int32)
    loss = np.arange(len(tokens)) >= (1 if loss_on == "all" else max(len(prompt), 1))
    if not loss.any():
        raise InputError(f"{where}: expected at least 2 tokens, found {len(tokens)}; remove or complete the row")
    return Tokenized(tokens, loss)
