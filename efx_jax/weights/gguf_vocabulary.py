"""A checkpoint's tokenizer as GGUF metadata: what `gguf_tokenizer` reads and llama.cpp splits texts by.

llama.cpp knows two kinds that LLaMA, Qwen2 and Qwen3 models use: byte-level BPE ("gpt2"), whose split pattern it looks
up by name, and SentencePiece's BPE ("llama"), which merges by the scores of the tokens. Keys and token types:
`convert_hf_to_gguf.py` and `src/llama-vocab.cpp` of github.com/ggml-org/llama.cpp.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec
from efx_jax.weights.gguf_file import read_header
from efx_jax.weights.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT
from efx_jax.weights.hf import load_tokenizer
from efx_jax.weights.source import TensorSource

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# llama.cpp's names for split patterns.
_SPLIT_NAMES = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}
_SPECIAL = ("bos", "eos", "unk", "pad")
_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def vocabulary_metadata(source: TensorSource, spec: ModelSpec) -> dict[str, Any]:
    """The `tokenizer.*` keys of a GGUF file.

    Args:
        source: the checkpoint; its folder holds the tokenizer, or its GGUF file does, whose own keys are then copied.
        spec: its model: every row of the embedding gets a token; those that the tokenizer lacks are marked unused.

    Raises:
        InputError: no tokenizer, or one whose kind or split pattern llama.cpp does not know.
    """
    path = Path(source.path)
    if path.suffix == ".gguf":
        metadata = read_header(path).metadata
        if "tokenizer.ggml.model" not in metadata:
            raise InputError(f"{path}: has no tokenizer, which llama.cpp needs in the file")
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"{path}: the tokenizer is no fast one; expected one with tokenizer.json")
    parts = json.loads(backend.to_str())
    if parts["model"].get("type") != "BPE":
        raise InputError(
            f"{path}: llama.cpp has no {parts['model'].get('type')} tokenizer for this model; expected BPE"
        )
    is_sentencepiece = bool(parts["model"].get("byte_fallback"))
    own = _sentencepiece_metadata(path, parts) if is_sentencepiece else _byte_level_metadata(path, parts)
    tokens, types = _tokens(path, parts, spec.vocab_size, tokenizer.unk_token if is_sentencepiece else None)
    metadata = {"tokens": tokens, "token_type": types, **own, **_special_ids(tokenizer, spec), **_flags(tokenizer)}
    if "scores" in own:
        metadata["scores"] = [own["scores"].get(token, 0.0) for token in tokens]
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    template = _chat_template(tokenizer)
    return named | ({"tokenizer.chat_template": template} if template else {})


def _byte_level_metadata(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    model, steps = parts["model"], _steps(parts["pre_tokenizer"], "pretokenizers")
    pre = _split_name(steps, bool(model.get("ignore_merges")))
    if pre is None:
        raise InputError(
            f"{path}: the tokenizer cuts texts in a way that has no name in llama.cpp or none known here "
            f"({json.dumps(steps)[:120]}); use llama.cpp's convert_hf_to_gguf.py on the --format hf export"
        )
    normalizers = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
    # llama.cpp does not compose accents, but accepts Qwen's tokenizers all the same.
    if normalizers not in ([], ["NFC"]) or (normalizers and pre != "qwen2"):
        raise InputError(f"{path}: the tokenizer's normalizer {' '.join(normalizers)} is unknown to llama.cpp")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise InputError(f"{path}: the tokenizer marks parts of words, which llama.cpp does not")
    return {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in _merges(model)]}


def _sentencepiece_metadata(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, space before a text, and the score of every token that merges produce: earlier merges score higher."""
    steps = _steps(parts["normalizer"], "normalizers") + _steps(parts["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds == ["Metaspace"] and not steps[0].get("split", True):
        has_prefix = steps[0].get("prepend_scheme") != "never"
    elif kinds in (["Prepend", "Replace"], ["Replace"]) and steps[-1].get("content") == "▁":
        has_prefix = kinds[0] == "Prepend"
    else:
        raise InputError(
            f"{path}: the tokenizer cuts texts in a way that llama.cpp does not ({json.dumps(steps)[:120]}); use "
            "llama.cpp's convert_hf_to_gguf.py on the --format hf export"
        )
    scores: dict[str, float] = {}
    last = ""
    for rank, (left, right) in enumerate(_merges(parts["model"])):
        token = left + right
        if token != last and token in scores:
            raise InputError(
                f"{path}: the tokenizer's merges come in an order that no scores of tokens give (of {token!r} twice), "
                "and llama.cpp merges by scores; use the --format hf export"
            )
        scores.setdefault(token, -float(rank))
        last = token
    return {"model": "llama", "pre": "default", "add_space_prefix": has_prefix, "scores": scores}


def _steps(node: Mapping[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, whether it is a sequence or a single one."""
    if node is None:
        return []
    return [dict(step) for step in node[members]] if node["type"] == "Sequence" else [dict(node)]


def _split_name(steps: Sequence[Mapping[str, Any]], ignores_merges: bool) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer splits a text before merging.

    Under LLaMA 3's own name, llama.cpp maps a piece of text that is a token to that token, whatever the merges are.
    """
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    first, own_split = steps[:-1], steps[-1].get("use_regex", True)
    if not first:
        return "gpt-2" if own_split else None
    if len(first) > 1:
        return None
    if first[0]["type"] == "Digits" and first[0].get("individual_digits") and own_split:
        return "smollm"
    if first[0]["type"] == "Split" and first[0].get("behavior") == "Isolated" and not own_split:
        name = _SPLIT_NAMES.get(first[0]["pattern"].get("Regex", ""))
        return "smaug-bpe" if name == "llama-bpe" and not ignores_merges else name
    return None


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _tokens(path: Path, parts: Mapping[str, Any], rows: int, unknown: str | None) -> tuple[list[str], list[int]]:
    """A token and its type for every row of the embedding; `unknown` is the token that unknown text becomes."""
    model, added = parts["model"], {token["id"]: token for token in parts["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()} | {
        index: token["content"] for index, token in added.items()
    }
    if max(by_id) >= rows:
        raise InputError(f"{path}: the tokenizer has token id {max(by_id)}, but the embedding has {rows} rows")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    has_bytes = bool(model.get("byte_fallback"))

    def kind(index: int, token: str) -> int:
        if token == unknown:
            return _UNKNOWN
        if index in added:
            return _CONTROL if added[index]["special"] else _USER_DEFINED
        if has_bytes and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return _BYTE
        return _NORMAL if index in by_id else _UNUSED

    return tokens, [kind(index, token) for index, token in enumerate(tokens)]


def _special_ids(tokenizer: Any, spec: ModelSpec) -> dict[str, int]:
    """The tokenizer's own ids, else the model's; of several tokens that end a text, GGUF names only one."""
    fallback = {"bos": spec.bos_token_id, "eos": next(iter(spec.eos_token_ids), None), "pad": spec.pad_token_id}
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    chosen = {name: fallback.get(name) if index is None else index for name, index in found.items()}
    return {_KEYS[name]: int(index) for name, index in chosen.items() if index is not None and index >= 0}


def _flags(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets a token before it and one after it, found by encoding a text."""
    ids = tokenizer("a")["input_ids"]
    return {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id],
    }


def _chat_template(tokenizer: Any) -> str:
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else str(template.get("default", next(iter(template.values()))))
