"""The small files beside the weights: `config.json` read and written, the tokenizer's files checked and copied."""

import dataclasses
import fnmatch
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, config_from_spec, spec_from_config, token_ids

GENERATION = "generation_config.json"

# What a loader, a chat program or a licence may need; never code, never another format's weights.
_EXTRAS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    GENERATION,
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

# Keys about code, which is not exported, and another tool's description of the base's own zeros.
_LEFT_OUT = ("auto_map", "sparsity_config", "compression_config")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); get a complete checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a JSON object; download the file again")
    return value


def config_to_write(spec: ModelSpec, dtype: str, original: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `config.json` of an export, in the old and the new schema at once.

    Args:
        spec: the exported model.
        dtype: "float32", "bfloat16" or "float16".
        original: raw `config.json` of the checkpoint that the model came from: its keys are kept, except those of the
            rotary embedding, the dtype and `architectures`, which follow the spec, and those about code or another
            tool's compression, which are dropped. None writes only the spec.

    Raises:
        InputError: `original` describes a different model from `spec`.
    """
    written = config_from_spec(spec, dtype)
    if original is None:
        return written
    _check_same_model(spec, original)
    rope = dict(original.get("rope_scaling") or original.get("rope_parameters") or {})  # as `rope_from_config` reads it
    rope.pop("type", None)  # the name of rope_type before transformers 4.43
    rope |= written["rope_parameters"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    config = {
        **original,
        "architectures": written["architectures"],
        "rope_parameters": rope,
        "rope_theta": spec.rope.theta,
        "rope_scaling": None if spec.rope.rope_type == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return {name: value for name, value in config.items() if name not in _LEFT_OUT}


def _check_same_model(spec: ModelSpec, original: Mapping[str, Any]) -> None:
    described = spec_from_config(original)
    for field in dataclasses.fields(spec):
        expected, found = getattr(spec, field.name), getattr(described, field.name)
        if expected != found:
            raise InputError(
                f"source config.json: {field.name} is {found}, but the parameters' spec has {expected}; "
                "pass the checkpoint that the parameters came from"
            )


def copy_extras(src: Path, dst: Path) -> None:
    """Copies the tokenizer's files, generation settings, chat templates and licences of a folder."""
    for file in sorted(path for path in src.rglob("*") if path.is_file()):
        name = file.relative_to(src).as_posix()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _EXTRAS if ("/" in name) == ("/" in pattern)):
            (dst / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, dst / name)


def declare_stops(folder: Path, stops: Iterable[int]) -> None:
    """Adds the tokens with which a model has learned to end its answers to its folder's `generation_config.json`.

    Generation in transformers and vLLM stops at the tokens that this file names, or without it at those in
    `config.json`, which is left unchanged. A base model trained on chats ends a turn with another token than a text.

    Args:
        folder: a Hugging Face folder.
        stops: ids of the tokens; nothing is written if generation already stops at all of them.
    """
    config, path = read_json(folder / "config.json"), folder / GENERATION
    settings = read_json(path) if path.is_file() else {}
    known = token_ids(settings if "eos_token_id" in settings else config, "eos_token_id")
    missing = sorted(set(stops) - set(known))
    if not missing:
        return
    if not settings:
        settings = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    settings["eos_token_id"] = [*known, *missing]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_tokenizer_fits(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a tokenizer with ids beyond the embedding. Fewer tokens than rows are normal (Qwen pads).

    Raises:
        InputError: `tokenizer.json` has an id beyond the `vocab_size` rows, or cannot be read.
    """
    file = folder / "tokenizer.json"
    rows = config.get("vocab_size")
    if not file.is_file() or not isinstance(rows, int):
        return
    largest = _largest_id(file)
    if largest >= rows:
        raise InputError(
            f"{file}: tokenizer has token id {largest}, but the embedding has {rows} rows (config.json vocab_size); "
            "use the tokenizer that belongs to this checkpoint"
        )


def _largest_id(file: Path) -> int:
    """The largest id in a `tokenizer.json`, -1 if it has none."""
    tokenizer = read_json(file)
    try:
        vocab = (tokenizer.get("model") or {}).get("vocab") or {}
        # A Unigram vocabulary is a list in id order, the others are token -> id.
        ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
        ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
        sound = all(type(index) is int for index in ids)
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise InputError(
            f"{file}: is no tokenizer's; expected model.vocab and added_tokens with integer ids; download it again"
        )
    return max(ids, default=-1)
