"""What the package needs from a tokenizer: to encode the beginning of a sequence, and its continuation."""

from collections.abc import Sequence
from typing import Any, Protocol

from efx_jax.errors import InputError


class Tokenizer(Protocol):
    """The parts of a Hugging Face tokenizer that are used."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: Any, *, add_special_tokens: bool = True) -> Any: ...
    def get_chat_template(self) -> str: ...
    def apply_chat_template(
        self,
        conversation: Any,
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
        enable_thinking: bool,
    ) -> Any: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...
    def get_added_vocab(self) -> dict[str, int]: ...
    def get_vocab(self) -> dict[str, int]: ...


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Refuses a tokenizer with ids beyond an embedding of `rows` rows: JAX would silently clamp them.

    Raises:
        InputError: an id of `rows` or more.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise InputError(
            f"the tokenizer has token id {largest}, but the embedding has {rows} rows; use the tokenizer that belongs "
            "to this checkpoint"
        )


def check_same_tokens(tokenizer: Tokenizer, other: Tokenizer, name: str) -> None:
    """Refuses another model's tokenizer if an id means another token; with equal vocabulary sizes nothing else would.

    Args:
        tokenizer: the model's tokenizer.
        other: the tokenizer of the other model, which reads the same ids.
        name: the other model's name, for the error message.

    Raises:
        InputError: the first such id. Ids that only one of them has (such as tokens added later) are no conflict.
    """
    own = {number: token for token, number in tokenizer.get_vocab().items()}
    others = {number: token for token, number in other.get_vocab().items()}
    for number in sorted(own.keys() & others.keys()):
        if own[number] != others[number]:
            raise InputError(
                f"{name}: token {number} is {others[number]!r}, expected {own[number]!r} as in the model's tokenizer; "
                "take one with the same tokenizer"
            )


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the beginnings of sequences, with exactly one BOS if the tokenizer adds one.

    A chat template may already have written BOS as text; it is not added a second time.
    """
    bos = _added_bos(tokenizer)
    encoded = _encode(prompts, tokenizer)
    return [ids if ids[: len(bos)] == bos else bos + ids for ids in encoded]


def encode_continuations(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of texts that continue a prompt, without special tokens.

    SentencePiece tokenizers put a space before any text; for them one leading space of the text itself is dropped, so
    that "Answer:" + " yes" does not get two.
    """
    if _adds_leading_space(tokenizer):
        texts = [text.removeprefix(" ") for text in texts]
    return _encode(texts, tokenizer)


def end_of(example_end: str, tokenizer: Tokenizer) -> list[int]:
    """The token that ends a response: the one with this text; for "", the EOS token if the tokenizer has one."""
    if example_end:
        return [tokenizer.convert_tokens_to_ids(example_end)]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    # Some tokenizers reject an empty string inside a list, or return the wrong type for it.
    present = [text for text in texts if text]
    encoded = iter(tokenizer(present, add_special_tokens=False)["input_ids"] if present else ())
    return [list(next(encoded)) if text else [] for text in texts]


def _added_bos(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.bos_token_id is None:
        return []
    first = tokenizer("a")["input_ids"][:1]
    return [tokenizer.bos_token_id] if first == [tokenizer.bos_token_id] else []


def _adds_leading_space(tokenizer: Tokenizer) -> bool:
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bool(str(tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith("\u2581"))
