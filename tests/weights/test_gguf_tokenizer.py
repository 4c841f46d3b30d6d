"""A tokenizer made from GGUF metadata gives the ids of transformers' own conversion."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from efx_jax.errors import InputError
from efx_jax.weights.gguf_tokenizer import gguf_tokenizer, save_gguf_tokenizer
from tests.weights.gguf_files import add_metadata, smollm2

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

TYPES = "tokenizer.ggml.token_type"
GOLDEN = Path(__file__).parents[1] / "golden"
# A token to which no merges lead: transformers' conversion cuts it up.
UNREACHED = ("llama3", "      ")
KINDS = ["gpt2", "smollm", "no_pre", "llama3", "qwen2", "qwen3", "llama2", "llama2_no_bos", "llama2_eos"]


def golden_texts() -> list[str]:
    return json.loads((GOLDEN / "gguf_texts.json").read_text(encoding="utf-8"))


def golden_case(kind: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "gguf_tokenizers.json").read_text(encoding="utf-8"))[kind]


def golden_tokens(kind: str) -> list[str]:
    return golden_case(kind)["metadata"]["tokenizer.ggml.tokens"]


def write_tokenizer(path: Path, architecture: str, metadata: dict[str, Any]) -> Path:
    """A GGUF file with a tokenizer and the few model keys that transformers asks for, but no tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_embedding_length(8)
    add_metadata(writer, metadata)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def tokenizer_file(path: Path, kind: str, **changed: Any) -> Path:
    """The golden case as a file, with metadata changed; None removes a key."""
    case = golden_case(kind)
    metadata = case["metadata"] | {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_tokenizer(path, case["architecture"], kept)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        gguf_tokenizer(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", kind))
    expected = golden_case(kind)["ids"]
    assert len(expected) == len(golden_texts())
    for text, ids in zip(golden_texts(), expected, strict=True):
        if (kind, text) != UNREACHED:
            assert tokenizer(text).input_ids == ids, repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_today(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torch")
    path = tokenizer_file(tmp_path / "m.gguf", kind)
    tokenizer = gguf_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert tokenizer.special_tokens_map == theirs.special_tokens_map
    assert tokenizer.chat_template == theirs.chat_template
    for text in golden_texts():
        ids = theirs(text).input_ids
        if (kind, text) != UNREACHED:
            assert tokenizer(text).input_ids == ids, repr(text)
            assert tokenizer(text, text).input_ids == theirs(text, text).input_ids, repr(text)
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == decoded, repr(text)


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("llama3", True), ("falcon3", True), ("qwen2", False)])
def test_a_token_that_no_merges_lead_to_is_taken_whole(tmp_path: Path, pre: str, whole: bool) -> None:
    tokens = golden_tokens("llama3")
    added = {"tokens": [*tokens, "qzqz"], "token_type": [*golden_case("llama3")["metadata"][TYPES], 1]}
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", "llama3", pre=pre, add_bos_token=False, **added))
    assert (tokenizer("qzqz").input_ids == [len(tokens)]) == whole
    assert len(tokenizer("qzqzq").input_ids) > 1
    if whole:
        kind, text = UNREACHED
        assert tokenizer(text).input_ids == [golden_tokens(kind).index(text)]


def reopened(path: Path, folder: Path, model_type: str | None) -> Any:
    """The tokenizer that AutoTokenizer finds in an export, beside a config.json of `model_type`."""
    folder.mkdir()
    save_gguf_tokenizer(path, folder)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_saved_folder_opens_to_the_same_ids(tmp_path: Path, kind: str, model_type: str | None) -> None:
    path = tokenizer_file(tmp_path / "m.gguf", kind)
    tokenizer, again = gguf_tokenizer(path), reopened(path, tmp_path / "saved", model_type)
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    for text in golden_texts():
        assert again(text).input_ids == tokenizer(text).input_ids, repr(text)


def test_saved_qwen2_folder_opens_to_the_same_ids_for_composed_text(tmp_path: Path) -> None:
    # transformers opens any qwen2 folder as its Qwen2Tokenizer, which composes accents first (NFC).
    path = tokenizer_file(tmp_path / "m.gguf", "qwen2")
    tokenizer, again = gguf_tokenizer(path), reopened(path, tmp_path / "saved", "qwen2")
    assert again.eos_token == tokenizer.eos_token
    for text in golden_texts():
        composed = unicodedata.normalize("NFC", text)
        assert again(text).input_ids == tokenizer(composed).input_ids, repr(text)


@pytest.mark.parametrize("kind", ["qwen2", "llama2"])
def test_saved_config_says_nothing_that_transformers_4_does_not_know(tmp_path: Path, kind: str) -> None:
    save_gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", kind), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    known = {"bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "chat_template"}
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(config) - known == {"tokenizer_class"}


def test_bos_and_eos_follow_the_flags(tmp_path: Path) -> None:
    plain = gguf_tokenizer(tokenizer_file(tmp_path / "a.gguf", "llama2_no_bos"))
    assert plain.bos_token_id not in plain("the cat").input_ids
    both = gguf_tokenizer(tokenizer_file(tmp_path / "b.gguf", "llama2_eos"))
    ids = both("the cat").input_ids
    assert (ids[0], ids[-1]) == (both.bos_token_id, both.eos_token_id)
    assert ids[1:-1] == plain("the cat").input_ids


def test_a_tokenizer_that_adds_no_space_removes_none(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", "llama2", add_space_prefix=False))
    for text in ("the cat", " the cat", "  a"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2"])
def test_byte_level_text_survives_encoding(tmp_path: Path, kind: str) -> None:
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", kind))
    for text in golden_texts():
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_special_and_user_defined_tokens_stay_whole(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", "qwen2"))
    ids = tokenizer("a<|im_start|>b<think>c").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|im_start|>", "b", "<think>", "c"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>c"


def test_vocabulary_never_outgrows_the_file(tmp_path: Path) -> None:
    # transformers adds GPT-2's <|endoftext|> to a vocabulary that lacks it: one row more than the embedding has.
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", "llama3"))
    assert len(tokenizer) <= len(golden_tokens("llama3"))
    assert "<|endoftext|>" not in tokenizer.get_vocab()


def test_control_token_outside_the_byte_alphabet_keeps_its_id(tmp_path: Path) -> None:
    # DeepSeek's; transformers cuts it into bytes and gives a bos of this kind an id beyond the embedding.
    bos = "<｜begin▁of▁sentence｜>"
    tokens = [bos if token == "<|endoftext|>" else token for token in golden_tokens("qwen2")]
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", "qwen2", tokens=tokens, add_bos_token=True))
    assert tokenizer.bos_token == bos
    assert tokenizer.bos_token_id == tokens.index(bos)
    assert tokenizer(f"a{bos}").input_ids == [tokens.index(bos), tokens.index("a"), tokens.index(bos)]
    assert len(tokenizer) <= len(tokens)


def test_chat_template_is_the_file_s(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(tokenizer_file(tmp_path / "m.gguf", "qwen2"))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hiho"


@pytest.mark.parametrize(
    ("kind", "changed", "named"),
    [
        ("qwen2", {"pre": "poro-chat"}, "'poro-chat'"),
        ("qwen2", {"model": "bert"}, "'bert'"),
        ("qwen2", {"tokens": None}, "tokenizer.ggml.tokens"),
        ("qwen2", {"merges": None}, "tokenizer.ggml.merges"),
        ("qwen2", {"merges": ["a zebra"]}, "'a zebra'"),
        ("qwen2", {"token_type": [1, 1]}, "tokenizer.ggml.token_type"),
        ("qwen2", {"eos_token_id": 100000}, "tokenizer.ggml.eos_token_id"),
        ("qwen2", {"eos_token_id": "last"}, "tokenizer.ggml.eos_token_id"),
        ("llama2", {"scores": None}, "tokenizer.ggml.scores"),
    ],
)
def test_unusable_metadata_is_refused_by_name(tmp_path: Path, kind: str, changed: dict[str, Any], named: str) -> None:
    assert named in refusal(tokenizer_file(tmp_path / "m.gguf", kind, **changed))


def test_smollm2_gives_the_ids_of_transformers() -> None:
    tokenizer = gguf_tokenizer(smollm2())
    golden = json.loads((GOLDEN / "gguf_smollm2.json").read_text(encoding="utf-8"))
    assert len(tokenizer) == 49152
    for text, ids in zip(golden_texts(), golden["ids"], strict=True):
        assert tokenizer(text).input_ids == ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_smollm2_saved_folder_opens_to_the_same_ids(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(smollm2())
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in golden_texts():
        assert again(text).input_ids == tokenizer(text).input_ids, repr(text)
