"""Boundaries, special tokens and loss flags are exact."""

from typing import Any

import numpy as np
import pytest

from efx_jax.data.prompts import Example
from efx_jax.data.tokenizer import encode_continuations, encode_prompts
from efx_jax.data.tokens import text_windows, tokenize
from efx_jax.errors import InputError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "yes", "no", "\u2581yes", "\u2581a", "\u2581"]
BOS, EOS, A, B, C, YES, NO = 0, 1, 3, 4, 5, 6, 7


def word_tokenizer(add_bos: bool):
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if add_bos:
        bare.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer():
    vocabulary = [(word, -float(i)) for i, word in enumerate(WORDS)]
    bare = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    bare.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def test_response_and_eos_carry_loss_and_the_prompt_does_not() -> None:
    (row,) = tokenize([Example("a b", " yes")], word_tokenizer(add_bos=True), 16)
    assert row.tokens.tolist() == [BOS, A, B, YES, EOS]
    assert row.loss.tolist() == [False, False, False, True, True]
    (row,) = tokenize([Example("a b", " yes")], word_tokenizer(add_bos=False), 16, "all")
    assert row.tokens.tolist() == [A, B, YES, EOS]
    assert row.loss.tolist() == [False, True, True, True]


def test_an_eos_inside_the_prompt_carries_no_loss() -> None:
    (row,) = tokenize([Example("a </s> b", " yes")], word_tokenizer(add_bos=False), 16)
    assert row.tokens.tolist() == [A, EOS, B, YES, EOS]
    assert row.loss.tolist() == [False, False, False, True, True]


def test_bos_is_never_doubled() -> None:
    tokenizer = word_tokenizer(add_bos=True)
    assert encode_prompts(["<s> a", "a", ""], tokenizer) == [[BOS, A], [BOS, A], [BOS]]
    assert encode_prompts(["a", ""], word_tokenizer(add_bos=False)) == [[A], []]


def test_plain_text_learns_every_token_but_the_first() -> None:
    (row,) = tokenize([Example("", "a b")], word_tokenizer(add_bos=False), 16)
    assert row.tokens.tolist() == [A, B, EOS]
    assert row.loss.tolist() == [False, True, True]
    (row,) = tokenize([Example("", "a b")], word_tokenizer(add_bos=True), 16)
    assert row.loss.tolist() == [False, True, True, True]


def test_a_long_response_is_cut_without_eos() -> None:
    with pytest.warns(UserWarning, match="1 of 2 training rows lose the end .*max_length 4; the first is example 1"):
        row, _ = tokenize([Example("a b", " yes no yes"), Example("a b", " yes")], word_tokenizer(add_bos=False), 4)
    assert row.tokens.tolist() == [A, B, YES, NO]
    assert row.loss.tolist() == [False, False, True, True]


def test_a_prompt_that_fills_the_context_is_refused_with_its_row() -> None:
    rows = [Example("a", " yes"), Example("a b c", " yes", "train.jsonl row 2")]
    with pytest.raises(InputError, match=r"train.jsonl row 2: the prompt has 3 tokens.*max_length 3"):
        tokenize(rows, word_tokenizer(add_bos=False), 3)
    with pytest.raises(InputError, match="example 2"):
        tokenize([rows[0], Example("a b c", " yes")], word_tokenizer(add_bos=False), 3)


def test_sentencepiece_does_not_double_the_separating_space() -> None:
    tokenizer = sentencepiece_tokenizer()
    space, space_yes = WORDS.index("\u2581"), WORDS.index("\u2581yes")
    assert tokenizer([" yes"], add_special_tokens=False)["input_ids"] == [[space, space_yes]]
    assert encode_continuations([" yes", "yes", "  yes"], tokenizer) == [[space_yes], [space_yes], [space, space_yes]]
    assert encode_continuations([" yes"], word_tokenizer(add_bos=False)) == [[YES]]


def test_windows_tile_the_stream_and_skip_only_first_tokens() -> None:
    windows = text_windows(["a b c", "yes no"], word_tokenizer(add_bos=True), window=3)
    assert [w.tokens.tolist() for w in windows] == [[BOS, A, B], [C, YES, NO]]
    assert all(w.loss.tolist() == [False, True, True] for w in windows)


def test_the_last_window_may_be_short_but_has_something_to_predict() -> None:
    lengths = [len(w.tokens) for w in text_windows(["a b c yes no"], word_tokenizer(add_bos=False), window=3)]
    assert lengths == [3, 2]
    lengths = [len(w.tokens) for w in text_windows(["a b c yes"], word_tokenizer(add_bos=False), window=3)]
    assert lengths == [3]


def test_the_limit_takes_the_first_tokens_whatever_follows() -> None:
    tokenizer = word_tokenizer(add_bos=False)
    texts = ["a b c " * 50] * 20
    whole = np.concatenate([w.tokens for w in text_windows(texts, tokenizer, window=7)])
    limited = np.concatenate([w.tokens for w in text_windows(texts, tokenizer, window=7, limit=49)])
    assert len(limited) == 49
    np.testing.assert_array_equal(limited, whole[:49])


def test_no_more_of_a_corpus_is_tokenised_than_the_limit_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def watched(prompts: list[str], tokenizer: Any) -> list[list[int]]:
        read.append(len(prompts[0]))
        return encode_prompts(prompts, tokenizer)

    monkeypatch.setattr("efx_jax.data.tokens.encode_prompts", watched)
    # Tokens of one letter and a blank, and some of many letters for which twice as much is read.
    for word, times in (("a ", 1), ("unknown" * 10 + " ", 3)):
        texts = [word * 10] * 10_000
        (window,) = text_windows(texts, word_tokenizer(add_bos=False), window=500, limit=500)
        assert len(window.tokens) == 500 and len(read) >= times
        assert sum(read) < 3 * len(word) * 564 + 6 * 564 * 8
        read.clear()


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 tokens, found 1"):
        text_windows(["a"], word_tokenizer(add_bos=False), window=4)
    with pytest.raises(InputError, match=r"eval\.window"):
        text_windows(["a b"], word_tokenizer(add_bos=False), window=1)
