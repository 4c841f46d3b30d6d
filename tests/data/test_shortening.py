"""A row that is too long loses words at the end of its context, as few as possible, and nothing else."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from efx_jax.config import DataConfig
from efx_jax.data.frames import apply_format
from efx_jax.data.prompts import Example
from efx_jax.data.shortening import shorten, shorten_training
from efx_jax.data.tasks import load_data, load_tasks
from efx_jax.data.tokenizer import encode_prompts
from efx_jax.data.tokens import tokenize
from efx_jax.errors import InputError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = ["the", "patient", "was", "given", "aspirin", "and", "recovered", "slowly", "after", "heart", "operation"]


def byte_tokenizer(bos: bool = False) -> "transformers.PreTrainedTokenizerFast":
    """Byte-level BPE trained on a few sentences: rare words become many tokens, common ones few."""
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = tokenizers.decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    bare.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if bos:
        bare.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


def rows(seed: int, count: int, longest: int) -> list[Example]:
    """Prompts of common, rare and Chinese words around contexts of any length."""
    chance = random.Random(seed)
    examples = []
    for number in range(count):
        pool = [*WORDS, "Qzxwv-17/β", "心臓手術後の患者は回復した。"]
        context = "".join(
            chance.choice(pool) + chance.choice([" ", "\n", "  "]) for _ in range(chance.randint(1, longest))
        )
        start = len("Text: ")
        examples.append(
            Example(f"Text: {context}\nWhy {number}?", " yes", f"row {number}", (start, start + len(context)))
        )
    return examples


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_what_is_kept_fits_and_one_word_more_would_not(style: str, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos)
    budget = {"plain": 60, "alpaca": 260}[style]
    before = apply_format(rows(seed=1, count=80, longest=60), style)
    after, count = shorten(before, tokenizer, budget + 7, 7)
    lengths = [len(ids) for ids in encode_prompts([row.prompt for row in after], tokenizer)]
    assert max(lengths) <= budget
    assert 10 < count < 70
    assert count == sum(old != new for old, new in zip(before, after, strict=True))
    for old, new in zip(before, after, strict=True):
        (_, stop), (_, kept) = old.context, new.context
        assert new.prompt == old.prompt[:kept] + old.prompt[stop:]
        if new != old:
            word = re.match(r"\s*\S+(\s*$)?", old.prompt[kept:stop])
            assert word
            more = old.prompt[: kept + word.end()] + old.prompt[stop:]
            assert len(encode_prompts([more], tokenizer)[0]) > budget


def test_a_context_may_lose_its_beginning_instead_of_its_end() -> None:
    tokenizer = byte_tokenizer()
    before = [dataclasses.replace(row, cut="beginning") for row in rows(seed=4, count=60, longest=60)]
    after, count = shorten(before, tokenizer, 67, 7)
    assert 10 < count < 55
    for old, new in zip(before, after, strict=True):
        assert len(encode_prompts([new.prompt], tokenizer)[0]) <= 60
        (start, stop), kept = old.context, new.context[1] - new.context[0]
        assert new.prompt == old.prompt[:start] + old.prompt[stop - kept :]
        assert new.prompt[slice(*new.context)] == old.prompt[stop - kept : stop]
        if new != old:
            word = re.search(r"(^\s*)?\S+\s*$", old.prompt[start : stop - kept])
            assert word
            more = old.prompt[:start] + old.prompt[start + word.start() :]
            assert len(encode_prompts([more], tokenizer)[0]) > 60


def test_casehold_keeps_the_mark_of_the_left_out_holding(tmp_path: Path) -> None:
    long = " ".join(WORDS * 30) + " the court (<HOLDING>) , and so on"
    row = {"citing_prompt": long, "label": "1"} | {f"holding_{number}": f"that {number}" for number in range(5)}
    (tmp_path / "casehold").mkdir()
    (tmp_path / "casehold" / "test.jsonl").write_text(json.dumps(row))
    config = DataConfig(root=str(tmp_path), max_length=600, format="alpaca")
    ((row,),) = (task.test for task in load_tasks(["casehold"], config, byte_tokenizer()))
    kept = row.prompt[slice(*row.context)]
    assert kept != long and long.endswith(kept) and "<HOLDING>" in kept


def test_the_question_and_the_answer_stay_whole_in_training() -> None:
    tokenizer = byte_tokenizer()
    answer = " because of the heart operation"
    before = [Example(row.prompt, answer, row.origin, row.context) for row in rows(2, 30, 80)]
    after, count = shorten_training(before, tokenizer, 64)
    assert 0 < count < 30
    for tokens in tokenize(after, tokenizer, 64):
        text = tokenizer.decode(tokens.tokens)
        assert text.endswith(f"?{answer}</s>")
        assert len(tokens.tokens) <= 64


def test_a_response_without_room_leaves_half_to_its_prompt() -> None:
    tokenizer = byte_tokenizer()
    (row,) = rows(3, 1, 200)
    long = Example(row.prompt, " " + " ".join(WORDS * 20), row.origin, row.context)
    (after,), count = shorten_training([long], tokenizer, 64)
    (tokens,) = tokenize([after], tokenizer, 64)
    assert (count, len(tokens.tokens)) == (1, 64)
    assert 26 <= int((~tokens.loss).sum()) <= 32


def test_rows_that_fit_and_rows_without_context_stay_as_they_are() -> None:
    tokenizer = byte_tokenizer()
    examples = [Example("Why? " * 50, " yes"), *rows(4, 5, 3), Example("", "text " * 100)]
    assert shorten(examples, tokenizer, 100, [3] * 7) == (examples, 0)


def test_a_prompt_that_is_too_long_without_its_context_is_refused_with_one_line() -> None:
    with pytest.raises(InputError, match=r"row 0: the prompt has 13 tokens even without its context.*to 15") as caught:
        shorten(rows(5, 1, 3), byte_tokenizer(), 5, 2)
    assert "\n" not in str(caught.value)


def test_text_without_blanks_is_cut_too() -> None:
    context = "心" * 300
    (after,), count = shorten([Example(context + "?", " yes", "row 1", (0, 300))], byte_tokenizer(), 500, 0)
    assert (count, after.context) == (1, (0, 160))
    assert after.prompt == "心" * 160 + "?"


def test_a_context_of_blanks_is_left_out_where_it_does_not_fit() -> None:
    (after,), count = shorten([Example(" " * 90 + "?", " yes", "row 1", (0, 90))], byte_tokenizer(), 20, 5)
    assert (count, after.prompt) == (1, "?")


@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_rows_to_learn_and_to_score_are_shortened_in_the_named_column(style: str, tmp_path: Path) -> None:
    lengths = [3, 9, 27, 81]
    table = [{"note": " ".join(WORDS * length), "q": f"Well, {length}?", "a": "yes"} for length in lengths]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, table)))
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps(table[3] | {"q": "Really?"}))
    config = DataConfig(
        train=str(path),
        test=(str(tests),),
        template="{note}\n{q} => {a}",
        context="note",
        format=style,  # type: ignore[arg-type]
        max_length=300,
        holdout=0,
    )
    tokenizer = byte_tokenizer()
    data = load_data(config, 0, tokenizer)
    assert data.report["train"]["shortened"] == 2
    assert {len(row.tokens) == 300 for row in tokenize(data.train, tokenizer, 300)} == {True, False}
    assert all(f"Well, {length}?" in row.prompt for length, row in zip(lengths, data.train, strict=True))
    (task,) = data.tasks
    prompt = encode_prompts([task.test[0].prompt], tokenizer)[0]
    assert 280 < len(prompt) <= 300 - task.new_tokens and "Really?" in task.test[0].prompt
    whole = load_tasks([str(tests)], config)
    assert len(whole[0].test[0].prompt) > len(task.test[0].prompt)
