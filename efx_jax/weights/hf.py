"""Hugging Face folders: opened tensor by tensor, loaded into the parameter tree, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, spec_from_config
from efx_jax.weights.safetensors_file import read_header, read_tensor
from efx_jax.weights.source import TensorSource, assemble

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_folder(path: str | os.PathLike[str]) -> TensorSource:
    """Opens a Hugging Face folder: `config.json` and `model.safetensors`, whole or in shards; reads no tensor.

    Raises:
        InputError: no such folder, no safetensors in it, a missing, truncated or garbled file, a tensor that the
            index promises and its shard lacks, or a tokenizer with more tokens than the embedding has rows.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a Hugging Face folder with config.json")
    config = read_json(folder / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    files: dict[str, Path] = {}
    promised = _promised_files(folder)
    for file in sorted(set(promised.values())):
        file_shapes, file_dtypes = read_header(file)
        shapes |= file_shapes
        dtypes |= file_dtypes
        files |= dict.fromkeys(file_shapes, file)
    for name, file in promised.items():
        if name and files.get(name) != file:
            raise InputError(f"{file}: tensor {name} is missing, though {INDEX} lists it here; download the file again")
    _check_tokenizer_fits(folder, config)
    return TensorSource(folder, config, shapes, dtypes, lambda name: read_tensor(files[name], name))


def load_pretrained(path: str | os.PathLike[str], dtype: str | None = "float32") -> tuple[dict[str, Any], ModelSpec]:
    """Loads a checkpoint into the parameter tree.

    Args:
        path: Hugging Face folder, .gguf file, Orbax folder of `convert_weights.py import`, run folder (its export),
            Hub name, or "quickstart".
        dtype: "float32", "bfloat16", "float16", or None to keep the checkpoint's own.

    Returns:
        The tree of `param_shapes(spec)` (jax arrays), and the spec.

    Raises:
        InputError: what the path holds is missing, damaged, unsupported or not finite.
    """
    source = open_checkpoint(path)
    spec = spec_from_config(source.config)
    return assemble(source, spec, dtype), spec


def open_checkpoint(path: str | os.PathLike[str]) -> TensorSource:
    """Opens whatever `load_pretrained` accepts; reads no tensor.

    Raises:
        InputError: what the path holds is missing, damaged or unsupported.
    """
    place = Path(path)
    if place.suffix == ".gguf":
        from efx_jax.weights.gguf import open_gguf

        return open_gguf(place)
    return open_folder(place)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); get a complete checkpoint") from error
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, expected a JSON object; download the file again")
    return value


def _promised_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file by the index, every file present; a checkpoint without index has one file, under ""."""
    if (folder / SINGLE).is_file():
        return {"": folder / SINGLE}
    if not (folder / INDEX).is_file():
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        if pickles:
            raise InputError(
                f"{pickles[0]}: is a pickle, which can run code when it is opened; expected {SINGLE}; "
                "get the checkpoint's safetensors version"
            )
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}; expected a Hugging Face folder with safetensors")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(f"{folder / INDEX}: has no weight_map; download the file again")
    files = {name: folder / shard for name, shard in weight_map.items()}
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise InputError(f"{file}: shard is missing, though {INDEX} lists it; download the file")
    return files


def _check_tokenizer_fits(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a tokenizer that makes ids beyond the embedding. Fewer tokens than rows are normal (Qwen pads)."""
    file = folder / "tokenizer.json"
    rows = config.get("vocab_size")
    if not file.is_file() or not isinstance(rows, int):
        return
    tokenizer = read_json(file)
    vocab = tokenizer.get("model", {}).get("vocab", {})
    added = [token["id"] for token in tokenizer.get("added_tokens") or []]
    # A Unigram vocabulary is a list in id order, the others are token -> id.
    largest = max([len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=-1), *added])
    if largest >= rows:
        raise InputError(
            f"{file}: tokenizer has token id {largest}, but the embedding has {rows} rows (config.json vocab_size); "
            "use the tokenizer that belongs to this checkpoint"
        )
