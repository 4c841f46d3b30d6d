"""Rows become prompt and response; frames surround the prompt only."""

import types

import pytest

from efx_jax.data.frames import apply_format
from efx_jax.data.prompts import Example, examples_from_rows, plain_text
from efx_jax.data.records import take_text
from efx_jax.data.tokens import tokenize
from efx_jax.errors import InputError


def refused(rows: list[dict], template: str, *expected: str) -> None:
    with pytest.raises(InputError) as caught:
        examples_from_rows(rows, "rows.jsonl", template)
    for part in (*expected,):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_arrow_splits_prompt_and_response() -> None:
    rows = [{"question": "Why?", "answer": "Because {braces} stay."}]
    (example,) = examples_from_rows(rows, "rows.jsonl", "Question: {question}\nAnswer: => {answer}")
    assert example == Example("Question: Why?\nAnswer:", " Because {braces} stay.")
    (example,) = examples_from_rows(rows, "rows.jsonl", "{question}\n=>{answer} {{end}}")
    assert example == Example("Why?\n", "Because {braces} stay. {end}")


def test_columns_are_taken_without_a_template() -> None:
    assert examples_from_rows([{"prompt": "p", "response": " r"}], "x") == [Example("p", " r")]
    assert examples_from_rows([{"text": "t", "url": 1}], "x") == [Example("", "t")]
    assert examples_from_rows([{"a": 3}], "x", "=>{a}") == [Example("", "3")]


def test_an_unknown_column_is_named_with_row_and_columns() -> None:
    refused([{"a": "1", "b": "2"}, {"b": "2", "c": "3"}], "{a} => {b}", "rows.jsonl row 2", "'a'", "b, c")
    refused([{"a": "1"}], "", "rows.jsonl row 1", "'text'", "found a")
    refused([{"a": "1"}], "{a.real} => {a}", "'a.real'")


def test_an_empty_response_or_text_is_refused() -> None:
    refused([{"text": "x"}, {"text": "  \n"}], "", "rows.jsonl row 2", "text is empty")
    refused([{"prompt": "p", "response": ""}], "", "rows.jsonl row 1", "response is empty")
    refused([{"prompt": "p", "response": None}], "", "rows.jsonl row 1", "'response' is empty")


@pytest.mark.parametrize("code", [0xD800, 0xDBFF, 0xDC00, 0xDFFF])
def test_half_of_a_surrogate_pair_is_no_text(code: int) -> None:
    half = chr(code)
    refused([{"text": "\ud7ff\ue000 \U0001f600"}, {"text": f"a{half}"}], "", "rows.jsonl row 2", "half of a surrogate")
    with pytest.raises(InputError, match="row 7: 'text' holds half of a surrogate pair"):
        take_text({"text": f"{half}b"}, "text", "row 7")


def test_a_template_needs_an_arrow_and_whole_braces() -> None:
    refused([{"a": "1"}], "{a}", "data.template", "=>")
    refused([{"a": "1"}], "{a} =>", "data.template", "=>")
    refused([{"a": "1"}], "{a => {a}", "data.template")


def test_the_alpaca_frame_surrounds_the_prompt() -> None:
    framed, text = apply_format([Example("Say hi.", " hi", "row 1"), Example("", " text")], "alpaca")
    assert framed.prompt.startswith("Below is an instruction that describes a task. Write a response")
    assert framed.prompt.endswith("### Instruction:\nSay hi.\n\n### Response:\n")
    assert (framed.response, framed.origin) == ("hi", "row 1")
    assert text == Example("", " text")


def test_chat_needs_a_template() -> None:
    with pytest.raises(InputError, match="chat template"):
        apply_format([Example("p", "r")], "chat", types.SimpleNamespace(chat_template=None))
    with pytest.raises(InputError, match="chat template"):
        apply_format([Example("p", "r")], "chat")


TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
STARTED = "{% if add_generation_prompt %}<assistant>{% endif %}"


def in_chat(template: str | dict[str, str]) -> str:
    """The prompt "Hi?" in a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare)
    tokenizer.chat_template = template
    (framed,) = apply_format([Example("Hi?", " yes")], "chat", tokenizer)
    assert framed.response == "yes"
    return framed.prompt


def test_chat_uses_the_tokenizers_template() -> None:
    assert in_chat(TURNS + STARTED) == "<user>Hi?<assistant>"
    assert in_chat({"default": TURNS + STARTED, "rag": "no"}) == "<user>Hi?<assistant>"


@pytest.mark.parametrize(("eos", "end"), [("</s>", "<end>"), ("<end>", ""), (None, "<end>")])
def test_an_answer_in_chat_ends_with_the_templates_end_of_a_turn(eos: str | None, end: str) -> None:
    """As the model is then asked in chats; a base model's end of sequence is often another token."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"yes": 0, "<unk>": 1}, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "</s>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <end>\n{% endfor %}" + STARTED
    examples = apply_format([Example("Hi?", " yes"), Example("", "yes yes")], "chat", tokenizer)
    assert [example.end for example in examples] == [end, ""]
    chat, text = tokenize(examples, tokenizer, 32)
    assert tokenizer.convert_ids_to_tokens(int(chat.tokens[-1])) == "<end>" and chat.loss[-1]
    assert tokenizer.convert_ids_to_tokens(int(text.tokens[-1])) == (eos or "yes")
    # A template that takes no answer says nothing of its end.
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}" + TURNS + STARTED
    assert [example.end for example in apply_format([Example("Hi?", " yes")], "chat", tokenizer)] == [""]


@pytest.mark.parametrize(
    ("clock", "date"),
    [
        # LLaMA 3.2's own lines.
        (
            "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
            '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
            '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n{{- date_string }}',
            "26 Jul 2024",
        ),
        ("{{ strftime_now('%A, %B %d, %Y, %H:%M:%S') }}", "Friday, July 26, 2024, 00:00:00"),
        ("{% macro today() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ today() }}", "2024-07-26"),
        ("{{ strftime_now('%e %B, %-m/%-d %-I %p') }}", "26 July, 7/26 12 AM"),
    ],
)
def test_a_chat_prompt_is_the_same_on_every_day(clock: str, date: str) -> None:
    assert in_chat(clock + TURNS + STARTED) == f"{date}<user>Hi?<assistant>"


def test_a_template_that_always_thinks_gets_an_empty_thought() -> None:
    closed = "<user>Hi?<assistant><think>\n\n</think>\n\n"
    assert in_chat(TURNS + STARTED + "{{ '<think>\n' }}") == closed
    assert in_chat(TURNS + STARTED + "<think>") == closed
    # Qwen3's own way to say it.
    asked = "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    assert in_chat(TURNS + STARTED + asked) == closed


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must\\nalternate') }}", "Roles must"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0].text.upper() }}", "has no attribute 'text'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ({"rag": TURNS}, "multiple chat templates with no default"),
    ],
)
def test_a_chat_template_that_fails_is_named_in_a_line(template: str | dict[str, str], reason: str) -> None:
    with pytest.raises(InputError, match="data.format chat: the tokenizer's chat template fails") as caught:
        in_chat(template)
    assert reason in str(caught.value) and "use plain or alpaca" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_text_joins_prompt_and_response() -> None:
    assert plain_text([Example("a:", " b"), Example("", "c")]) == ["a: b", "c"]


def test_a_written_out_line_break_or_tab_of_a_template_is_one() -> None:
    (row,) = examples_from_rows([{"q": r"C:\new", "a": "b"}], "rows", r"Path:\t{q}\nWhat? =>\n{a}")
    assert (row.prompt, row.response) == ("Path:\tC:\\new\nWhat?", "\nb")
