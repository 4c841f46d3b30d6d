"""The shape of a decoder, read from a Hugging Face `config.json` and written back to one.

`config.json` is read as raw JSON: transformers 5 replaced `config.rope_theta` by `rope_parameters`, while older
versions know only `rope_theta` and `rope_scaling`. Both schemas are read and both are written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from efx_jax.errors import InputError
from efx_jax.model.rope import RopeSpec, positive_number, rope_from_config, rope_to_config

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Default for a field that config.json may omit (from transformers' configuration classes).
_DEFAULT_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything `forward` needs to know besides the weights. Hashable, so it can be static under `jax.jit`.

    The axis letters of its sizes: `vocab_size` V, `hidden_size` D, `intermediate_size` F, `num_layers` L,
    `num_heads` N, `num_kv_heads` K, `head_dim` H.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeSpec
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Reads a `config.json` dictionary.

    Args:
        config: raw JSON of a Hugging Face `config.json`, old or new schema.

    Returns:
        The model's spec.

    Raises:
        InputError: a field that is missing or has the wrong type; an unsupported `model_type`, activation, attention or
            RoPE option.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(
            f"config.json: model_type {model_type!r} is not supported; expected one of "
            f"{', '.join(ARCHITECTURES)}; use a LLaMA, Qwen2 or Qwen3 checkpoint"
        )
    _refuse_unsupported(config)
    num_heads = _required_int(config, "num_attention_heads")
    hidden_size = _required_int(config, "hidden_size")
    num_kv_heads = _optional_int(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise InputError(
            f"config.json: num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}"
        )
    head_dim = _head_dim(config, hidden_size, num_heads)
    max_positions = _optional_int(config, "max_position_embeddings", {"llama": 2048}.get(model_type, 32768))
    return ModelSpec(
        model_type=model_type,
        vocab_size=_required_int(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_required_int(config, "intermediate_size"),
        num_layers=_required_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive_number(config, "rms_norm_eps", _DEFAULT_EPS),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        max_position_embeddings=max_positions,
        rope=rope_from_config(config, max_positions),
        biases=_biases(config, model_type),
        qk_norm=model_type == "qwen3",
        bos_token_id=_token_id(config, "bos_token_id"),
        eos_token_ids=token_ids(config, "eos_token_id"),
        pad_token_id=_token_id(config, "pad_token_id"),
    )


def config_from_spec(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """Builds a `config.json` dictionary that old and new versions of transformers both read as the same model.

    Args:
        spec: the model.
        dtype: "float32", "bfloat16" or "float16": the dtype of the stored weights.
    """
    rope_parameters = rope_to_config(spec.rope)
    eos = list(spec.eos_token_ids)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.model_type]],
        "model_type": spec.model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "attention_bias": "q_proj" in spec.biases and spec.model_type != "qwen2",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        "pad_token_id": spec.pad_token_id,
        "rope_parameters": {**rope_parameters, "rope_theta": spec.rope.theta},
        "rope_theta": spec.rope.theta,
        "rope_scaling": None if spec.rope.rope_type == "default" else rope_parameters,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if spec.model_type == "llama":
        config["mlp_bias"] = "gate_proj" in spec.biases
    else:
        config["use_sliding_window"] = False
    return config


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """`[O, I]` of each of the seven linears of a block."""
    d, f, h = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * h, spec.num_kv_heads * h
    return {
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }


def param_shapes(spec: ModelSpec) -> dict[str, Any]:
    """The parameter tree with a shape tuple at every leaf: the layout used throughout the package.

    `embed_tokens [V,D]`, `layers.<name>` stacked over L, `norm [D]`, and `lm_head [V,D]` unless it is tied.
    The bias of linear `x` is `layers.x_bias [L,O]`; Qwen3's `q_norm` and `k_norm` are `[L,H]`.
    """
    num_layers, d = spec.num_layers, spec.hidden_size
    linears = linear_shapes(spec)
    layers: dict[str, tuple[int, ...]] = {name: (num_layers, *shape) for name, shape in linears.items()}
    layers |= {f"{name}_bias": (num_layers, linears[name][0]) for name in spec.biases}
    layers |= {"input_layernorm": (num_layers, d), "post_attention_layernorm": (num_layers, d)}
    if spec.qk_norm:
        layers |= {"q_norm": (num_layers, spec.head_dim), "k_norm": (num_layers, spec.head_dim)}
    shapes: dict[str, Any] = {"embed_tokens": (spec.vocab_size, d), "layers": layers, "norm": (d,)}
    if not spec.tie_word_embeddings:
        shapes["lm_head"] = (spec.vocab_size, d)
    return shapes


def init_params(key: jax.Array, spec: ModelSpec, dtype: Any = "float32") -> dict[str, Any]:
    """Random weights of the spec's shapes (normal, std 0.02; norms 1, biases 0), for tests and benchmarks."""

    def init(path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.Array:
        name = path[-1].key
        if "norm" in name:
            return jax.numpy.ones(shape, dtype)
        if name.endswith("_bias"):
            return jax.numpy.zeros(shape, dtype)
        leaf_key = jax.random.fold_in(key, sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
        return (0.02 * jax.random.normal(leaf_key, shape, "float32")).astype(dtype)

    return jax.tree_util.tree_map_with_path(init, param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))


def _required_int(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value <= 0:
        raise InputError(f"config.json: {name} must be a positive integer, found {value!r}")
    return value


def _optional_int(config: Mapping[str, Any], name: str, default: int) -> int:
    return default if config.get(name) is None else _required_int(config, name)


def _token_id(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    if value is not None and type(value) is not int:
        raise InputError(f"config.json: {name} must be an integer or null, found {value!r}")
    return value


def token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The ids of a setting that holds one id, several or none.

    Raises:
        InputError: the setting holds anything else.
    """
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(index) is not int for index in ids):
        raise InputError(f"config.json: {name} must be an integer, a list of integers or null, found {value!r}")
    return tuple(ids)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"config.json: {name} must be true, false or null, found {value!r}")
    return bool(value)


def _head_dim(config: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    head_dim = _optional_int(config, "head_dim", 128 if config["model_type"] == "qwen3" else 0)
    if not head_dim and hidden_size % num_heads:
        raise InputError(
            f"config.json: hidden_size {hidden_size} must be a multiple of num_attention_heads {num_heads}, "
            "or head_dim be given"
        )
    head_dim = head_dim or hidden_size // num_heads
    if head_dim % 2:
        raise InputError(f"config.json: head_dim {head_dim} must be even: rotary embedding turns pairs")
    return head_dim


def _biases(config: Mapping[str, Any], model_type: str) -> tuple[str, ...]:
    attention = ("q_proj", "k_proj", "v_proj")
    if model_type == "qwen2":
        return attention
    names: tuple[str, ...] = (*attention, "o_proj") if _flag(config, "attention_bias") else ()
    if _flag(config, "mlp_bias"):
        names += ("gate_proj", "up_proj", "down_proj")
    return names


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(f"config.json: hidden_act {activation!r} is not supported; expected 'silu'")
    layer_types = config.get("layer_types")
    if not isinstance(layer_types, list | None):
        raise InputError(f"config.json: layer_types must be a list or null, found {layer_types!r}")
    if _flag(config, "use_sliding_window") or any(kind != "full_attention" for kind in layer_types or ()):
        raise InputError(
            "config.json: sliding-window attention is not supported; expected use_sliding_window false and "
            "layer_types of full_attention only"
        )
    if config.get("pretraining_tp", 1) not in (None, 1):
        raise InputError("config.json: pretraining_tp other than 1 is not supported; set it to 1")
    refuse_quantised(config)


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Refuses the `config.json` of a checkpoint with quantised tensors (GPTQ, AWQ, FP8, ...).

    Raises:
        InputError: the checkpoint is quantised.
    """
    if config.get("quantization_config"):
        raise InputError(
            "config.json: quantization_config found; quantised safetensors are not supported; use the unquantised "
            "checkpoint or a GGUF file"
        )
