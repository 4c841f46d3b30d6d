"""A folder's tokenizer gives the ids of its `tokenizer.json`, whatever class it is declared as."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from efx_jax.errors import InputError
from efx_jax.weights.gguf_tokenizer import save_gguf_tokenizer
from efx_jax.weights.hf import load_tokenizer, write_extras
from tests.weights.test_gguf_tokenizer import UNREACHED, golden_texts, tokenizer_file

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACE]}
SPACED = ["a", " a", "  a b", "</s>a", "a</s> b"]


def write_folder(folder: Path, kind: str, model_type: str, declared: dict[str, Any], **steps: Any) -> Path:
    """A golden tokenizer with other steps, declared as some class beside a config.json."""
    folder.mkdir()
    save_gguf_tokenizer(tokenizer_file(folder / "m.gguf", kind), folder)
    change(folder / "tokenizer.json", **steps)
    change(folder / "tokenizer_config.json", **declared)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def change(file: Path, **fields: Any) -> None:
    """Other fields of a JSON object; None removes one of a tokenizer_config.json."""
    found = json.loads(file.read_text(encoding="utf-8")) | fields
    if file.name == "tokenizer_config.json":
        found = {name: value for name, value in found.items() if value is not None}
    file.write_text(json.dumps(found), encoding="utf-8")


def test_a_step_that_the_declared_class_drops_is_kept(tmp_path: Path) -> None:
    # SmolLM2's: the class that transformers 5 builds has no Digits.
    declared = {"tokenizer_class": "GPT2Tokenizer", "pad_token": None}
    folder = write_folder(tmp_path / "hf", "gpt2", "llama", declared, pre_tokenizer=DIGITS)
    found, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert any(theirs(text).input_ids != written.encode(text).ids for text in golden_texts())
    for text in golden_texts():
        ids = written.encode(text).ids
        assert found(text).input_ids == ids, repr(text)
        assert found.decode(ids) == text
    assert found.special_tokens_map == theirs.special_tokens_map
    assert found.chat_template == theirs.chat_template
    assert len(found) == len(theirs)


def test_a_token_that_no_merges_lead_to_stays_one(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "hf", "llama3", "llama", {"tokenizer_class": "GPT2Tokenizer"}, pre_tokenizer=BYTE_LEVEL
    )
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    kind, text = UNREACHED
    assert kind == "llama3" and len(written.encode(text, add_special_tokens=False).ids) == 1
    assert len(transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids) > 1
    for found in (load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(exported(folder))):
        assert found(text).input_ids == written.encode(text).ids


def test_an_export_opens_with_the_ids_that_it_was_trained_on(tmp_path: Path) -> None:
    """By `AutoTokenizer`, as the model card says; a class that keeps all steps stays declared."""
    for name, steps, stays in (("smollm2", {"pre_tokenizer": DIGITS}, False), ("gpt2", {}, True)):
        declared = {"tokenizer_class": "GPT2Tokenizer", "eos_token": None}
        folder = write_folder(tmp_path / name, "gpt2", "llama", declared, **steps)
        out = tmp_path / f"{name}-out"
        out.mkdir()
        write_extras(folder, out)
        shutil.copyfile(folder / "config.json", out / "config.json")
        found, trained = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(folder)
        for text in golden_texts():
            assert found(text).input_ids == trained(text).input_ids, repr(text)
        assert found.special_tokens_map == trained.special_tokens_map
        same = (out / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
        assert same == stays


def exported(folder: Path) -> Path:
    """What an export takes over of a folder's tokenizer, beside its config.json."""
    out = folder.with_name(f"{folder.name}-out")
    out.mkdir()
    shutil.copyfile(folder / "config.json", out / "config.json")
    write_extras(folder, out)
    return out


@pytest.mark.parametrize(
    ("declared", "normalizer"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, SPACE),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, SPACE),
        ({"tokenizer_class": "LlamaTokenizerFast"}, LEGACY),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, LEGACY),
    ],
)
def test_sentencepiece_spaces_are_those_of_the_file(
    tmp_path: Path, declared: dict[str, Any], normalizer: dict[str, Any]
) -> None:
    """transformers 5 puts one before a text that does not begin with one, and behind a special token by `legacy`."""
    folder = write_folder(tmp_path / "hf", "llama2", "llama", declared, normalizer=normalizer, pre_tokenizer=None)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert any(theirs(text).input_ids != written.encode(text).ids for text in SPACED)
    opened = [load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(exported(folder))]
    for text in [*SPACED, *golden_texts()]:
        for found in opened:
            assert found(text).input_ids == written.encode(text).ids, repr(text)


def test_legacy_false_leaves_the_spaces_to_transformers(tmp_path: Path) -> None:
    declared = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    folder = write_folder(tmp_path / "hf", "llama2", "llama", declared, normalizer=LEGACY, pre_tokenizer=None)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SPACED:
        assert load_tokenizer(folder)(text).input_ids == theirs(text).input_ids, repr(text)


@pytest.mark.parametrize("has_prefix", [False, True])
def test_a_sentencepiece_model_alone_says_whether_a_space_comes_first(tmp_path: Path, has_prefix: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "hf"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on a mat", "a tab ab ba abba"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=has_prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    written = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for found in (load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(exported(folder))):
        for text in ("a", "the cat", "mat ab"):
            assert found(text).input_ids == written.encode(text), repr(text)


def test_what_no_declaration_mends_is_said(tmp_path: Path) -> None:
    """transformers 5 builds a Qwen2Tokenizer of every qwen2 model, whatever class is declared."""
    folder = write_folder(tmp_path / "hf", "gpt2", "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, pre_tokenizer=DIGITS)
    with pytest.warns(UserWarning, match=f"{folder}: AutoTokenizer .* another tokenizer than tokenizer.json has"):
        out = exported(folder)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    advised = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    assert any(theirs(text).input_ids != written.encode(text).ids for text in golden_texts())
    for text in golden_texts():
        for found in (advised, load_tokenizer(out)):
            assert found(text).input_ids == written.encode(text).ids, repr(text)


def test_special_tokens_that_only_the_class_names_stay(tmp_path: Path) -> None:
    declared = {"tokenizer_class": "GPT2Tokenizer", "eos_token": None, "bos_token": None}
    folder = write_folder(tmp_path / "hf", "gpt2", "llama", declared, pre_tokenizer=DIGITS)
    assert load_tokenizer(folder).eos_token == load_tokenizer(folder).bos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("kind", "model_type", "declared", "steps"),
    [
        ("qwen2", "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, {"normalizer": {"type": "NFC"}}),
        ("llama2", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}, {}),
        ("llama3", "llama", {}, {}),
    ],
)
def test_what_transformers_builds_rightly_stays(
    tmp_path: Path, kind: str, model_type: str, declared: dict[str, Any], steps: dict[str, Any]
) -> None:
    folder = write_folder(tmp_path / "hf", kind, model_type, declared, **steps)
    found, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(theirs)
    assert found.special_tokens_map == theirs.special_tokens_map
    assert found.chat_template == theirs.chat_template
    for text in golden_texts():
        assert found(text).input_ids == theirs(text).input_ids, repr(text)


@pytest.mark.parametrize(
    "steps",
    [{"pre_tokenizer": {"type": "OfNextYear"}}, {"model": {"type": "BPE", "vocab": [1], "merges": []}}, {"model": 3}],
)
def test_a_tokenizer_json_that_cannot_be_loaded_is_named(tmp_path: Path, steps: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "hf", "gpt2", "llama", {}, **steps)
    with pytest.raises(
        InputError, match="has no tokenizer that transformers can load .*tokenizer.json again"
    ) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
