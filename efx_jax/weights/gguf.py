"""Opens a GGUF file of a llama, qwen2 or qwen3 model as if it were a Hugging Face checkpoint.

Tensors have their Hugging Face names and Hugging Face's layout. For the names, and the order in which llama.cpp stores
the rows of q and k, see `gguf-py/gguf/tensor_mapping.py` and `LlamaModel.permute` of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.errors import InputError
from efx_jax.weights.byte_ranges import Part
from efx_jax.weights.gguf_config import config_from_metadata
from efx_jax.weights.gguf_file import GGUFFile, read_header, read_rows, tensor_dtype
from efx_jax.weights.source import TensorSource

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
# Not a weight: becomes a rotary scaling in the configuration.
ROPE_FACTORS = "rope_freqs.weight"


def open_gguf(path: str | Path) -> TensorSource:
    """Opens a GGUF file; a tensor's data is read on demand.

    Args:
        path: a GGUF file of architecture llama, qwen2 or qwen3.

    Returns:
        The source: `config` is a Hugging Face `config.json` made from the metadata; tensors are `[O, I]` and
        have their Hugging Face names. Float tensors keep their dtype, quantised ones become float32.

    Raises:
        InputError: not a GGUF file, a truncated file, an unsupported architecture, option or quantisation type, or a
            missing or unknown tensor.
    """
    file = read_header(path)
    factors = _read_all(file, ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    config = config_from_metadata(file, factors)
    gguf_names = _hugging_face_names(file, config)

    def read_part(name: str, part: Part) -> np.ndarray:
        tensor = file.tensors[gguf_names[name]]
        order = _row_order(gguf_names[name], file, config)
        rows = np.arange(tensor.shape[0]) if order is None else order
        return read_rows(file.path, tensor, rows[part[0]], *part[1:])

    return TensorSource(
        path=file.path,
        config=config,
        shapes={name: file.tensors[gguf_name].shape for name, gguf_name in gguf_names.items()},
        dtypes={name: tensor_dtype(file.tensors[gguf_name]) for name, gguf_name in gguf_names.items()},
        read_part=read_part,
    )


def _read_all(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return read_rows(file.path, tensor, np.arange(tensor.shape[0]))


def _hugging_face_names(file: GGUFFile, config: dict[str, Any]) -> dict[str, str]:
    """Hugging Face name -> GGUF name, for exactly the tensors of this architecture."""
    names = {hf_name: name for name, hf_name in stored_names(config).items()}
    missing = next((name for name in names.values() if name not in file.tensors), None)
    if missing is not None:
        raise InputError(f"{file.path}: tensor {missing!r} is missing; the file is damaged or not a whole model")
    unknown = sorted(set(file.tensors) - set(names.values()) - {ROPE_FACTORS})
    if unknown:
        raise InputError(
            f"{file.path}: {len(unknown)} tensors do not belong to a {config['model_type']} model, the first is "
            f"{unknown[0]!r}; running without them would be wrong"
        )
    return names


def stored_names(config: Mapping[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor that a configuration requires, in llama.cpp's order."""
    return dict(_expected_names(config))


def stored_order(gguf_name: str, rows: int, config: Mapping[str, Any]) -> np.ndarray | None:
    """Index of Hugging Face's row for each of the `rows` rows of a tensor in a file; None if the orders agree."""
    heads = _rotated_heads(gguf_name, config)
    return None if heads is None else np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _expected_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "token_embd.weight", "model.embed_tokens.weight"
    for layer in range(config["num_hidden_layers"]):
        for leaf, hf_leaf in _BLOCK_NAMES.items():
            if leaf not in _QK_NORMS or config["model_type"] == "qwen3":
                yield f"blk.{layer}.{leaf}.weight", f"model.layers.{layer}.{hf_leaf}.weight"
            if _has_bias(leaf, config):
                yield f"blk.{layer}.{leaf}.bias", f"model.layers.{layer}.{hf_leaf}.bias"
    yield "output_norm.weight", "model.norm.weight"
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight"


def _has_bias(leaf: str, config: Mapping[str, Any]) -> bool:
    if leaf in ("attn_q", "attn_k", "attn_v"):
        return config["model_type"] == "qwen2" or config["attention_bias"]
    if leaf == "attn_output":
        return config["attention_bias"]
    return leaf in ("ffn_gate", "ffn_up", "ffn_down") and config["mlp_bias"]


def _row_order(gguf_name: str, file: GGUFFile, config: dict[str, Any]) -> np.ndarray | None:
    """Index of the file's row for each row of Hugging Face's tensor; None if the orders agree."""
    heads = _rotated_heads(gguf_name, config)
    if heads is None:
        return None
    num_rows = file.tensors[gguf_name].shape[0]
    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _rotated_heads(gguf_name: str, config: Mapping[str, Any]) -> int | None:
    """Heads of a llama's q or k, else None: llama.cpp rotates rows (2j, 2j+1), Hugging Face (j, j + H/2)."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    return heads.get(gguf_name.split(".")[-2]) if config["model_type"] == "llama" else None
