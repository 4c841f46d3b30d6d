"""Rows of messages: which answers are learned, behind what, and what is no conversation."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from efx_jax.config import DataConfig
from efx_jax.data.conversations import Turn, conversation_of
from efx_jax.data.frames import apply_format
from efx_jax.data.prompts import Example, examples_from_rows
from efx_jax.data.shortening import shorten_training, without_long_talks
from efx_jax.data.sources import hold_out, own_examples
from efx_jax.data.tokens import tokenize
from efx_jax.errors import InputError

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
STARTED = "{% if add_generation_prompt %}<assistant>{% endif %}"


def said(*texts: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + turns


@pytest.fixture
def tokenizer() -> Any:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["<unk>", "<system>", "<user>", "<assistant>", "short", "cough", "cold", "rash", "none"]
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"<\w+>|\w+"), "isolated")
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=bare)
    found.chat_template = TURNS + STARTED
    return found


def test_every_answer_is_an_example_behind_all_that_was_said_before(tokenizer: Any) -> None:
    row = {"messages": said("cough", "cold", "rash", "none", system="short")}
    first, second = apply_format(examples_from_rows([row], "rows"), "chat", tokenizer)
    assert (first.prompt, first.response) == ("<system>short<user>cough<assistant>", "cold")
    assert second.prompt == "<system>short<user>cough<assistant>cold<user>rash<assistant>" and second.response == "none"
    assert {first.origin, second.origin} == {"rows row 1"}
    learned = tokenize([second], tokenizer, 32)[0]
    # Earlier answers are read and not learned.
    assert tokenizer.convert_ids_to_tokens(learned.tokens[learned.loss].tolist()) == ["none"]


def test_sharegpt_says_the_same() -> None:
    named = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = said("cough", "cold", system="short")
    row = {"conversations": [{"from": named[turn["role"]], "value": turn["content"]} for turn in turns]}
    assert conversation_of(row, "") == conversation_of({"messages": turns}, "") == [Turn(**turn) for turn in turns]


@pytest.mark.parametrize("style", ["plain", "alpaca"])
def test_one_question_and_its_answer_need_no_chat(style: Any) -> None:
    one = examples_from_rows([{"messages": said("cough", "cold")}], "rows")
    assert apply_format(one, style) == apply_format([Example("cough", " cold")], style)
    for more in (said("cough", "cold", "rash", "none"), said("cough", "cold", system="short")):
        with pytest.raises(
            InputError, match=rf"row 1: a conversation of \d turns .* data.format {style}; expected chat"
        ):
            apply_format(examples_from_rows([{"messages": more}], "rows"), style)


def test_a_text_or_a_whole_pair_goes_before_a_conversation() -> None:
    row = {"messages": said("cough", "cold"), "prompt": "rash", "response": "none"}
    assert examples_from_rows([row], "rows") == [Example("rash", "none")]
    assert examples_from_rows([row], "rows", "{prompt}? => {response}") == [Example("rash?", " none")]
    assert examples_from_rows([{"messages": row["messages"], "text": "rash"}], "rows") == [Example("", "rash")]
    # The first question alone is none.
    asked = {"prompt": "cough", "prompt_id": "7", "messages": row["messages"]}
    assert examples_from_rows([asked], "rows") == [Example("cough", " cold")]


def test_of_joined_sets_the_columns_that_are_filled_count() -> None:
    turns = [{"role": None, "from": "human", "value": "cough"}, {"role": "assistant", "content": "cold", "value": None}]
    assert conversation_of({"messages": turns}, "") == [Turn("user", "cough"), Turn("assistant", "cold")]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (said("cough"), "found user; repair"),
        ([], "found none; repair"),
        (said("cough", "cold")[::-1], "found assistant, user; repair"),
        (said("cough", "cold") + said("rash", "none", system="short"), "found user, assistant, system, user"),
        ([{"role": "tool", "content": "x"}], "messages 1: expected a role among system, .* found 'tool'"),
        ([{"role": "user", "content": " "}], "messages 1: expected text as content, found no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages 1: .* found a list"),
        (["cough"], "messages 1: expected a role and a content, found str"),
        ([{"role": ["user"], "content": "x"}], "messages 1: expected a role among"),
        (said("half \ud800 of a pair", "cold"), "messages 1: holds half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(messages: Any, problem: str) -> None:
    with pytest.raises(InputError, match=f"^rows row 2: .*{problem}") as caught:
        examples_from_rows([{"messages": said("a", "b")}, {"messages": messages}], "rows")
    assert "\n" not in str(caught.value)


def test_answers_that_come_too_late_are_left_out_and_counted(tokenizer: Any) -> None:
    talk = {"messages": said("cough", "cold", "rash", "none", "cough", "short")}
    framed = apply_format(examples_from_rows([talk], "rows"), "chat", tokenizer)
    with pytest.warns(UserWarning, match="1 of 3 answers come so late .*max_length 9 ends before them; .* rows row 1"):
        kept = without_long_talks(framed, tokenizer, 9)
    assert [example.response for example in kept] == ["cold", "none"]
    assert without_long_talks(framed, tokenizer, 13) == framed
    with pytest.raises(InputError, match="expected room for one"):
        without_long_talks(framed[1:], tokenizer, 4)


def test_a_question_that_may_be_shortened_makes_no_answer_come_too_late(tokenizer: Any) -> None:
    """Six tokens of frame and earlier turns: what is left of nine goes to the answer and then to the question."""
    talk = {"messages": said("cough", "cold", "rash rash rash rash rash rash", "none", "cough", "short none cold rash")}
    framed = apply_format(examples_from_rows([talk], "rows", context="prompt"), "chat", tokenizer)
    with pytest.warns(UserWarning, match="1 of 3 answers come so late"):
        kept = without_long_talks(framed, tokenizer, 9)
    shortened, count = shorten_training(kept, tokenizer, 9)
    assert [example.response for example in shortened] == ["cold", "none"] and count == 1
    assert shortened[1].prompt == "<user>cough<assistant>cold<user>rash<assistant>"
    rows = tokenize(shortened, tokenizer, 9)
    assert [len(row.tokens) for row in rows] == [4, 8]
    # The last answer loses its end behind turns that leave it less than half of the room.
    with warnings.catch_warnings(record=True):
        [last], _ = shorten_training(framed[2:], tokenizer, 22)
        [row] = tokenize([last], tokenizer, 22)
    assert last.prompt.endswith("none<user><assistant>") and len(row.tokens) == 22


def test_answers_of_one_conversation_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    talks = [{"messages": said(f"q{n}", "a", "and then?", "b", "hm", "c")} for n in range(12)]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    kept, held = hold_out(own_examples(str(path), DataConfig()), 0.3, seed=0)
    assert len(kept) + len(held) == 36 and 0 < len(held) < 36
    assert {example.origin for example in kept}.isdisjoint(example.origin for example in held)
