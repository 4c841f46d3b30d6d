"""Writes a GGUF file for llama.cpp from any checkpoint, with one tensor in memory at a time.

Keys, names and dtypes are those that llama.cpp's own `convert_hf_to_gguf.py` writes (github.com/ggml-org/llama.cpp):
matrices in the requested dtype, vectors in float32, the rows of a llama's q and k in the order of llama.cpp's rotary
embedding, LLaMA 3's rotary scaling as the tensor `rope_freqs.weight`. What llama.cpp does not compute is refused.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.errors import InputError
from efx_jax.files import atomic_file
from efx_jax.model.rope import RopeSpec, yarn_attention_factor
from efx_jax.model.spec import ModelSpec, config_from_spec
from efx_jax.weights.gguf import ROPE_FACTORS, stored_names, stored_order
from efx_jax.weights.gguf_config import llama3_factors
from efx_jax.weights.gguf_vocabulary import vocabulary_metadata
from efx_jax.weights.hf import open_model
from efx_jax.weights.source import DTYPES, TensorSource, cast

_TYPES = {"float32": ("F32", 0), "float16": ("F16", 1), "bfloat16": ("BF16", 32)}
_QUANTIZATION_VERSION = 2


def export_gguf(src: str | os.PathLike[str], dst: str | os.PathLike[str], dtype: str = "float16") -> None:
    """Writes a checkpoint and its tokenizer as one GGUF file.

    Args:
        src: whatever `load_pretrained` accepts; it must have a tokenizer.
        dst: the file to make, NAME.gguf.
        dtype: dtype of the matrices, "float16", "bfloat16" or "float32"; norms and biases are float32.

    Raises:
        InputError: no `gguf` package, `src` is damaged or unsupported, llama.cpp does not support the model or its
            tokenizer, a number exceeds `dtype`, `dst` exists, or the disk is full.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError("export --format gguf needs the gguf package; run: pip install gguf")
    if Path(dst).suffix != ".gguf":
        raise InputError(f"{dst}: expected a file name that ends in .gguf")
    source, spec = open_model(src)
    _check_architecture(spec)
    vocabulary = vocabulary_metadata(source, spec)
    metadata = _model_metadata(source, spec, dtype) | vocabulary
    names = stored_names(_plain_config(spec))
    sizes = {name: math.prod(source.shapes[hf_name]) for name, hf_name in names.items()}
    needs = sum(size * _storage(source, names[name], dtype).itemsize for name, size in sizes.items())
    with atomic_file(dst, needs=needs) as partial:
        _write(partial, source, spec, names, metadata, dtype)


def _write(
    path: Path, source: TensorSource, spec: ModelSpec, names: Mapping[str, str], metadata: Mapping[str, Any], dtype: str
) -> None:
    """Writes the header with all tensors first, then their data in the same order."""
    import gguf

    writer = gguf.GGUFWriter(path, spec.model_type)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        factors = _stored_factors(spec)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, hf_name in names.items():
            storage = _storage(source, hf_name, dtype)
            shape = source.shapes[hf_name]
            kind = gguf.GGMLQuantizationType[_TYPES[storage.name][0]]
            writer.add_tensor_info(name, shape, storage, math.prod(shape) * storage.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, hf_name in names.items():
            writer.write_tensor_data(_tensor(source, spec, name, hf_name, dtype))
    finally:
        writer.close()


def _tensor(source: TensorSource, spec: ModelSpec, name: str, hf_name: str, dtype: str) -> np.ndarray:
    """One tensor as stored in the file."""
    values = cast(source, _storage(source, hf_name, dtype).name).read(hf_name)
    if not np.isfinite(values).all():
        raise InputError(f"{source.path}: tensor {hf_name} holds numbers that are not finite; get an intact checkpoint")
    order = stored_order(name, len(values), _plain_config(spec))
    values = values if order is None else values[order]
    return np.ascontiguousarray(values)


def _storage(source: TensorSource, hf_name: str, dtype: str) -> np.dtype[Any]:
    """Matrices in the requested dtype, vectors in float32, as in llama.cpp."""
    return DTYPES[dtype] if len(source.shapes[hf_name]) > 1 else DTYPES["float32"]


def _plain_config(spec: ModelSpec) -> dict[str, Any]:
    """The spec's configuration with every key on which the tensors' names depend."""
    own_biases = spec.model_type != "qwen2" and "q_proj" in spec.biases
    return config_from_spec(spec, "float32") | {"attention_bias": own_biases, "mlp_bias": "gate_proj" in spec.biases}


def _check_architecture(spec: ModelSpec) -> None:
    """Refuses what llama.cpp's code for this architecture does not read."""
    if spec.model_type == "qwen2" and spec.num_heads * spec.head_dim != spec.hidden_size:
        raise InputError(
            f"config.json: head_dim {spec.head_dim} times num_attention_heads {spec.num_heads} is not hidden_size "
            f"{spec.hidden_size}, which llama.cpp takes for granted in a qwen2 model; export it to --format hf"
        )
    known = {"llama": set(spec.biases), "qwen2": {"q_proj", "k_proj", "v_proj"}, "qwen3": set()}[spec.model_type]
    if set(spec.biases) - known:
        raise InputError(
            f"config.json: biases of {', '.join(sorted(set(spec.biases) - known))} are unknown to llama.cpp in a "
            f"{spec.model_type} model; export it to --format hf"
        )


def _model_metadata(source: TensorSource, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """The keys that llama.cpp builds the model from; floats are stored as float32, ints as uint32."""
    arch = spec.model_type
    keys: dict[str, Any] = {
        "block_count": spec.num_layers,
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.rms_norm_eps),
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.rope.theta),
        "vocab_size": spec.vocab_size,
        **_rope_metadata(spec.rope),
    }
    general = {
        "general.type": "model",
        "general.name": _model_name(source.path),
        "general.file_type": _TYPES[dtype][1],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    return general | {f"{arch}.{key}": value for key, value in keys.items()}


def _model_name(path: Path) -> str:
    """The model's name, from its folder or file; a dot in a folder's name (Llama-3.2-1B) does not start a suffix."""
    place = path.absolute()
    if place.suffix == ".gguf":
        return place.stem
    if place.parent.name == "snapshots":
        # The Hub's cache: models--OWNER--NAME/snapshots/COMMIT.
        return place.parent.parent.name.split("--")[-1]
    # A run's export is named after the run.
    return place.parent.name if place.name == "export" else place.name


def _rope_metadata(rope: RopeSpec) -> dict[str, Any]:
    """The rotary scaling as metadata, if llama.cpp reads it from there."""
    if rope.rope_type in ("default", "llama3"):
        return {}
    keys: dict[str, Any] = {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type == "linear":
        return keys
    if rope.rope_type != "yarn":
        raise InputError(f"config.json: rope_type {rope.rope_type!r} has no form in GGUF; export it to --format hf")
    usual = 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
    if not math.isclose(yarn_attention_factor(rope), usual, rel_tol=1e-6):
        raise InputError(
            f"config.json: yarn's attention factor is {yarn_attention_factor(rope):g} (attention_factor, mscale), but "
            f"llama.cpp takes {usual:g} for the factor {rope.factor:g}; export it to --format hf"
        )
    if not rope.truncate:
        raise InputError("config.json: yarn with truncate false has no form in GGUF; export it to --format hf")
    keys["rope.scaling.original_context_length"] = rope.original_max_position
    keys |= {} if rope.beta_fast == 32 else {"rope.scaling.yarn_beta_fast": float(rope.beta_fast)}
    keys |= {} if rope.beta_slow == 1 else {"rope.scaling.yarn_beta_slow": float(rope.beta_slow)}
    return keys


def _stored_factors(spec: ModelSpec) -> np.ndarray | None:
    """The divisors of the `[H/2]` rotary frequencies under LLaMA 3.1's scaling, float32; None without it."""
    return llama3_factors(spec.rope, spec.head_dim).astype(np.float32) if spec.rope.rope_type == "llama3" else None


def _add(writer: Any, key: str, value: Any) -> None:
    """Adds one value in the type that llama.cpp expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
