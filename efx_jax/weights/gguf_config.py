"""A Hugging Face `config.json` made from the metadata of a GGUF file.

Keys: the GGUF specification (`docs/gguf.md` of github.com/ggml-org/ggml) and `gguf-py/gguf/constants.py` of llama.cpp.
"""

import math
from typing import Any

import numpy as np

from efx_jax.errors import InputError
from efx_jax.model.rope import RopeSpec
from efx_jax.model.spec import ARCHITECTURES
from efx_jax.weights.gguf_file import GGUFFile

_PLAIN_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# All other keys that are read below, or that do not affect what the model computes.
_KNOWN_KEYS = (
    *_PLAIN_KEYS,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.finetuned",
    "vocab_size",
    "tensor_data_layout",
)
_TEXT_KEYS = ("rope.scaling.type", "tensor_data_layout")
_NEUTRAL_VALUES = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "use_parallel_residual": False,
}
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH = 1.0, 4.0, 8192
_DEFAULT_THETA = 10000.0


def config_from_metadata(file: GGUFFile, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Makes a `config.json` dictionary.

    Args:
        file: the parsed GGUF header.
        rope_factors: `rope_freqs.weight`, `[H/2]` divisors of the rotary frequencies, if the file has them.

    Returns:
        The configuration, with `rope_parameters` as transformers 5 writes them.

    Raises:
        InputError: an unsupported architecture or option, a missing key.
    """
    model_type = _model_type(file)
    options = {
        key.removeprefix(f"{model_type}."): _same_in_every_layer(file, key, value)
        for key, value in file.metadata.items()
        if key.startswith(f"{model_type}.")
    }
    _check_options(file, options)
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    config |= {name: options[key] for key, name in _PLAIN_KEYS.items()}
    config["num_key_value_heads"] = options.get("attention.head_count_kv", options["attention.head_count"])
    config["head_dim"] = _head_dim(file, options)
    config["vocab_size"] = _vocab_size(file)
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = model_type != "qwen2" and "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    config["rope_parameters"] = _rope_parameters(file, options, config["head_dim"], rope_factors)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _model_type(file: GGUFFile) -> str:
    model_type = file.metadata.get("general.architecture")
    if model_type not in tuple(ARCHITECTURES):
        raise InputError(
            f"{file.path}: general.architecture {model_type!r} is not supported; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return str(model_type)


def _same_in_every_layer(file: GGUFFile, key: str, value: Any) -> Any:
    """An option's value; some writers give a per-layer list even if all layers agree."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise InputError(f"{file.path}: {key!r} differs from layer to layer, which is not supported: {value[:8]}")
    return value[0]


def _check_options(file: GGUFFile, options: dict[str, Any]) -> None:
    for key, value in options.items():
        name = f"{file.metadata['general.architecture']}.{key}"
        if key not in _KNOWN_KEYS and not (key in _NEUTRAL_VALUES and value == _NEUTRAL_VALUES[key]):
            raise InputError(
                f"{file.path}: metadata option {name!r} = {value!r} is not supported; running without it would be wrong"
            )
        if key in _KNOWN_KEYS and key not in _TEXT_KEYS and (isinstance(value, str) or value < 0):
            raise InputError(
                f"{file.path}: metadata option {name!r} is {value!r}, expected a number; the file is damaged"
            )
    missing = [key for key in _PLAIN_KEYS if not options.get(key)]
    if missing:
        raise InputError(f"{file.path}: metadata option {missing[0]} is missing or 0; the file is damaged")


def _head_dim(file: GGUFFile, options: dict[str, Any]) -> int:
    derived = options["embedding_length"] // options["attention.head_count"]
    rotary = options.get("rope.dimension_count")
    head_dim = options.get("attention.key_length") or rotary or derived
    lengths = {"attention.value_length": options.get("attention.value_length"), "rope.dimension_count": rotary}
    for key, value in lengths.items():
        if value not in (None, head_dim):
            raise InputError(f"{file.path}: {key} {value} differs from the head width {head_dim}; it is not supported")
    return head_dim


def _vocab_size(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor 'token_embd.weight' is missing; the file is damaged or not a model")
    return file.tensors["token_embd.weight"].shape[0]


def _rope_parameters(
    file: GGUFFile, options: dict[str, Any], head_dim: int, rope_factors: np.ndarray | None
) -> dict[str, Any]:
    theta = options.get("rope.freq_base", _DEFAULT_THETA)
    # llama.cpp takes a factor without a type to be linear.
    kind = options.get("rope.scaling.type", "linear")
    factor = options.get("rope.scaling.factor", options.get("rope.scale_linear", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise InputError(f"{file.path}: rope.scaling.type {kind!r} is not supported; expected none, linear or yarn")
    if kind == "linear" and factor == 1:
        kind = "none"
    if rope_factors is not None and np.any(rope_factors != 1):
        if kind != "none":
            raise InputError(f"{file.path}: both rope_freqs.weight and rope.scaling.type {kind!r}; expected one")
        return _llama3_parameters(file, theta, head_dim, rope_factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    parameters = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        renamed = {
            "original_max_position_embeddings": options.get("rope.scaling.original_context_length"),
            "beta_fast": options.get("rope.scaling.yarn_beta_fast"),
            "beta_slow": options.get("rope.scaling.yarn_beta_slow"),
        }
        parameters |= {name: value for name, value in renamed.items() if value is not None}
    return parameters


def _llama3_parameters(file: GGUFFile, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """The four numbers behind `rope_freqs.weight`.

    The factors determine low, high and original length only up to a common multiple, so low and high are assumed to be
    1 and 4, as in every published model.
    """
    factor = float(factors.max())
    wavelengths = _wavelengths(theta, head_dim)
    lengths = [_LLAMA3_LENGTH]
    between = (factors > 1) & (factors < factor)
    if factors.shape == wavelengths.shape and between.any():
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        fitted = (smooth * (_LLAMA3_HIGH - _LLAMA3_LOW) + _LLAMA3_LOW) * wavelengths[between]
        lengths.append(round(float(np.median(fitted))))
    for length in lengths:
        rope = RopeSpec("llama3", theta, factor, length, _LLAMA3_LOW, _LLAMA3_HIGH)
        expected = llama3_factors(rope, head_dim)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    raise InputError(
        f"{file.path}: rope_freqs.weight does not follow LLaMA 3.1's rule (low 1, high 4, any length); other rotary "
        "scalings stored as a tensor are not supported; use the safetensors checkpoint"
    )


def llama3_factors(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """The divisors of LLaMA 3.1's `[H/2]` rotary frequencies (transformers' `_compute_llama3_parameters`)."""
    periods = rope.original_max_position / _wavelengths(rope.theta, head_dim)
    smooth = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return 1 / ((1 - smooth) / rope.factor + smooth)


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    """Wavelengths of the `[H/2]` rotary frequencies, in tokens."""
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
