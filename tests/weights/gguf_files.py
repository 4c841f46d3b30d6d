"""GGUF files of tiny models, written as the converter of llama.cpp writes them from Hugging Face tensors."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.weights.gguf import open_gguf

gguf = pytest.importorskip("gguf")

L, D, N, K, F, V = 2, 32, 4, 2, 64, 24
H = 16  # not D / N, so that a derived head width would show
Tensors = dict[str, np.ndarray]


def hf_tensors(architecture: str, tied: bool = False, seed: int = 0) -> Tensors:
    """Random float32 tensors of a tiny model under Hugging Face names."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    for i in range(L):
        layer = f"model.layers.{i}"
        for name, shape in {"q": (N * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, N * H)}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if architecture == "qwen2" and name != "o":
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
        shapes |= {f"{layer}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        if architecture == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (H,) for name in "qk"}
    return {name: rng.standard_normal(shape, "float32") for name, shape in shapes.items()}


def gguf_name(hf_name: str) -> str:
    renamed = {
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "_proj": "",
    }
    for old, new in renamed.items():
        hf_name = hf_name.replace(old, new)
    return hf_name


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of a llama: row j of a half comes beside row j of the other half."""
    return np.stack(np.split(tensor.reshape(heads, H, -1), 2, axis=1), axis=2).reshape(tensor.shape)


def metadata_for(architecture: str) -> dict[str, Any]:
    values = {
        "block_count": L,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "attention.head_count": N,
        "attention.head_count_kv": K,
        "attention.key_length": H,
        "attention.value_length": H,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500000.0,
        "rope.dimension_count": H,
    }
    named = {f"{architecture}.{key}": value for key, value in values.items()}
    return named | {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def gguf_tensors(architecture: str, tensors: Tensors) -> Tensors:
    stored = {}
    for name, tensor in tensors.items():
        heads = {"q_proj": N, "k_proj": K}.get(name.split(".")[-2])
        permuted = heads is not None and architecture == "llama"
        stored[gguf_name(name)] = interleave(tensor, heads) if permuted else tensor
    return stored


def add_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    """Gives a `gguf.GGUFWriter` every value as the type that llama.cpp's converter writes."""
    for key, value in metadata.items():
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


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: Tensors,
    raw_types: dict[str, str] | None = None,
) -> Path:
    """Writes a file; `raw_types` names the quantisation type of those tensors that are given as raw bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, metadata)
    for name, tensor in tensors.items():
        raw_type = (raw_types or {}).get(name)
        writer.add_tensor(name, tensor, raw_dtype=None if raw_type is None else gguf.GGMLQuantizationType[raw_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_model(path: Path, architecture: str = "llama", **changed: Any) -> Path:
    metadata = metadata_for(architecture) | {f"{architecture}.{key}": value for key, value in changed.items()}
    return write_gguf(path, architecture, metadata, gguf_tensors(architecture, hf_tensors(architecture)))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        open_gguf(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def smollm2() -> Path:
    """The real model, where the environment names its file."""
    path = Path(os.environ.get("EFX_SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("EFX_SMOLLM2_GGUF does not name a file")
    return path
