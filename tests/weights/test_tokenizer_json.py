"""A folder's tokenizer gives the ids of its `tokenizer.json`, whatever class it is declared as."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from efx_jax.errors import InputError
from efx_jax.weights.gguf_tokenizer import save_gguf_tokenizer
from efx_jax.weights.hf import load_tokenizer, write_extras
from tests.weights.test_gguf_tokenizer import golden_texts, tokenizer_file

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACE]}


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


def test_special_tokens_that_only_the_class_names_stay(tmp_path: Path) -> None:
    declared = {"tokenizer_class": "GPT2Tokenizer", "eos_token": None, "bos_token": None}
    folder = write_folder(tmp_path / "hf", "gpt2", "llama", declared, pre_tokenizer=DIGITS)
    assert load_tokenizer(folder).eos_token == load_tokenizer(folder).bos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("kind", "model_type", "declared", "steps"),
    [
        ("qwen2", "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}, {"normalizer": {"type": "NFC"}}),
        ("llama2", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}, {}),
        (
            "llama2",
            "llama",
            {"tokenizer_class": "LlamaTokenizer", "legacy": True},
            {"normalizer": LEGACY, "pre_tokenizer": None},
        ),
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
