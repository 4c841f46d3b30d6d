"""Rows that are too long lose only the end, or the beginning, of their context."""

import bisect
import dataclasses
import re
import warnings
from collections.abc import Sequence

from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import Tokenizer, encode_continuations, encode_prompts
from efx_jax.errors import InputError

# Text without blanks can be cut too, every 32 characters.
_WORD = re.compile(r"\S{1,32}")
_MOST_CHARACTERS_PER_TOKEN = 6  # for the first try; where tokens are longer it takes a few more, and stays exact
_ROWS_AT_ONCE = 256
_GUESSES = 6  # tries by proportion before halving


@dataclasses.dataclass(frozen=True)
class _Search:
    """Search for the most words of a context that fit: `fits` words do, `exceeds` do not; `tried` is the next try.

    `lengths[n]` is the number of characters of n words, counted from the side that is kept.
    """

    example: Example
    lengths: list[int]
    budget: int
    fits: int
    exceeds: int
    tried: int
    tries: int = 0


def shorten_training(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> tuple[list[Example], int]:
    """Shortens contexts so that prompt, response and EOS fit into `max_length` tokens.

    If a response does not fit even with an empty context, its prompt gets half of the tokens (behind earlier turns of a
    conversation, what these take), and `tokenize` then cuts the response.

    Args:
        examples: framed examples.
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens of prompt, response and EOS together.

    Returns:
        The examples in the same order, and how many of them were shortened.

    Raises:
        InputError: as in `shorten`.
    """
    if not any(_has_context(example) for example in examples):
        return list(examples), 0
    half = max_length // 2
    responses = encode_continuations([example.response for example in examples], tokenizer)
    reserve = [len(response) + 1 for response in responses]
    unsure = [
        row for row, example in enumerate(examples) if _has_context(example) and (reserve[row] > half or example.turns)
    ]
    bare = encode_prompts([_cut(examples[row], 0).prompt for row in unsure], tokenizer)
    for row, prompt in zip(unsure, bare, strict=True):
        room = max_length - len(prompt)
        if reserve[row] > room:
            reserve[row] = min(room, half) if examples[row].turns else half
    return shorten(examples, tokenizer, max_length, reserve)


def without_long_talks(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Leaves out the answers of conversations whose earlier turns leave no room for them; a warning counts them.

    A question that may be shortened counts as empty: `shorten_training` comes afterwards.

    Args:
        examples: framed examples.
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens of a prompt plus the first token of its response.

    Raises:
        InputError: no examples would be left.
    """
    later = [row for row, example in enumerate(examples) if example.turns]
    shortest = [_cut(example, 0) if _has_context(example) else example for example in examples if example.turns]
    prompts = encode_prompts([example.prompt for example in shortest], tokenizer)
    long = {row for row, prompt in zip(later, prompts, strict=True) if len(prompt) >= max_length}
    if not long:
        return list(examples)
    told = (
        f"{len(long)} of {len(examples)} answers come so late in their conversations that data.max_length {max_length} "
        f"ends before them; the first is in {examples[min(long)].origin}"
    )
    if len(long) == len(examples):
        raise InputError(f"{told}; expected room for one; raise data.max_length")
    warnings.warn(f"{told}; they are left out", stacklevel=2)
    return [example for row, example in enumerate(examples) if row not in long]


def shorten(
    examples: Sequence[Example], tokenizer: Tokenizer, max_length: int, reserve: int | Sequence[int]
) -> tuple[list[Example], int]:
    """Where prompts leave too little room, cuts as few words as possible from one side of their contexts.

    The prompts are tokenised whole, so the result is exact for any tokenizer. Examples without a context are left
    unchanged.

    Args:
        examples: framed examples.
        tokenizer: a Hugging Face tokenizer.
        max_length: maximum tokens of a prompt, BOS included, plus its reserve.
        reserve: tokens that must stay free after a prompt: one number, or one per example.

    Returns:
        The examples in the same order, and how many of them were shortened.

    Raises:
        InputError: a prompt is too long even with an empty context.
    """
    reserves = [reserve] * len(examples) if isinstance(reserve, int) else reserve
    shortened = list(examples)
    count = 0
    rows = [row for row, example in enumerate(examples) if _has_context(example)]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows[start : start + _ROWS_AT_ONCE]
        searches = _finish([_begin(examples[row], max_length - reserves[row]) for row in chunk], tokenizer)
        for row, search in zip(chunk, searches, strict=True):
            if search.fits < 0:
                needed = len(encode_prompts([_cut(search.example, 0).prompt], tokenizer)[0])
                raise InputError(
                    f"{search.example.origin or f'example {row + 1}'}: the prompt has {needed} tokens even without its "
                    f"context; expected room for {reserves[row]} more within data.max_length {max_length}; shorten the "
                    f"prompt or raise data.max_length to {needed + reserves[row]}"
                )
            if search.fits < len(search.lengths) - 1:
                shortened[row] = _cut(search.example, search.lengths[search.fits])
                count += 1
    return shortened, count


def _has_context(example: Example) -> bool:
    return example.context[0] < example.context[1]


def _begin(example: Example, budget: int) -> _Search:
    start, stop = example.context
    words = list(_WORD.finditer(example.prompt[start:stop]))
    if example.cut == "end":
        lengths = [0, *(word.end() for word in words)]
    else:
        lengths = [0, *(stop - start - word.start() for word in reversed(words))]
    # The last entry is the whole context, including surrounding blanks.
    lengths[max(1, len(lengths) - 1) :] = [stop - start]
    beside = len(example.prompt) - lengths[-1]
    likely = bisect.bisect_right(lengths, _MOST_CHARACTERS_PER_TOKEN * budget - beside) - 1
    return _Search(example, lengths, budget, fits=-1, exceeds=len(lengths), tried=max(likely, 0))


def _finish(searches: Sequence[_Search], tokenizer: Tokenizer) -> list[_Search]:
    found = list(searches)
    unsure = list(range(len(found)))
    while unsure:
        prompts = [_cut(found[row].example, found[row].lengths[found[row].tried]).prompt for row in unsure]
        for row, tokens in zip(unsure, encode_prompts(prompts, tokenizer), strict=True):
            found[row] = _narrow(found[row], len(tokens))
        unsure = [row for row in unsure if found[row].exceeds - found[row].fits > 1]
    return found


def _narrow(search: _Search, tokens: int) -> _Search:
    """The search with its bounds updated by a try that gave `tokens` tokens, and with the next try."""
    fits, exceeds = search.fits, search.exceeds
    if tokens <= search.budget:
        fits = search.tried
    else:
        exceeds = search.tried
    guess = (fits + exceeds) // 2 if search.tries >= _GUESSES else _guess(search, tokens)
    tried = min(max(guess, fits + 1), exceeds - 1)
    return dataclasses.replace(search, fits=fits, exceeds=exceeds, tried=tried, tries=search.tries + 1)


def _guess(search: _Search, tokens: int) -> int:
    """The number of words that probably fits, from the characters per token of the last try."""
    kept = search.lengths[search.tried]
    per_token = len(_cut(search.example, kept).prompt) / max(tokens, 1)
    return bisect.bisect_right(search.lengths, kept + (search.budget - tokens) * per_token) - 1


def _cut(example: Example, length: int) -> Example:
    """The example with only `length` characters of its context."""
    start, stop = example.context
    kept = (start, start + length) if example.cut == "end" else (stop - length, stop)
    prompt = example.prompt[:start] + example.prompt[slice(*kept)] + example.prompt[stop:]
    return dataclasses.replace(example, prompt=prompt, context=(start, start + length))
