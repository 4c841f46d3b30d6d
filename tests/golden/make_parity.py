"""Writes parity.npz: logits and RoPE frequencies of transformers for tiny models, for tests without torch.

Run with torch installed: python tests/golden/make_parity.py
The models are drawn from a seed by a bit stream that numpy guarantees, so that only results are stored.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

Config = dict[str, Any]
FILE = Path(__file__).with_name("parity.npz")
LENGTH = 16
STORED = slice(1, None, 2)
FAR_POSITIONS = [0, 1, 7, 100, 1000, 4095, 4096, 5000, 8191, 8192, 8193, 9000, 10000, 12000, 16000, 16383]

_TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
_LLAMA = {**_TINY, "model_type": "llama"}
_QWEN3 = {**_TINY, "model_type": "qwen3", "head_dim": 16}
_WIDE = {**_LLAMA, "head_dim": 64}


def _yarn(**options: Any) -> Config:
    return {
        **_WIDE,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            **options,
        },
    }


# Half in the schema of transformers 4 (rope_theta, rope_scaling), half in that of transformers 5 (rope_parameters).
CASES: dict[str, Config] = {
    "llama": {**_LLAMA, "rope_theta": 5e5},
    "llama_mha": {**_LLAMA, "num_key_value_heads": 4},
    "llama_tied": {**_LLAMA, "tie_word_embeddings": True},
    "llama_head_dim": {**_LLAMA, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "llama_biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**_TINY, "model_type": "qwen2", "rope_theta": 1e6},
    "qwen3": {**_QWEN3, "rope_theta": 1e6},
    "qwen3_biases": {**_QWEN3, "attention_bias": True},
    "linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e4},
    "llama3": {
        **_WIDE,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": _yarn(),
    "yarn_attention_factor": _yarn(attention_factor=0.8),
    "yarn_mscale": _yarn(mscale=1.0, mscale_all_dim=0.7),
    "yarn_not_truncated": _yarn(truncate=False),
    "yarn_qwen2": {
        **_TINY,
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    },
}
FAR_CASES = tuple(name for name in CASES if name.startswith(("llama3", "yarn")))


def positions(case: str) -> np.ndarray:
    """Positions [2, T] of the two rows: consecutive, but for the second row of the long-context cases."""
    near = np.arange(LENGTH)
    return np.stack([near, np.asarray(FAR_POSITIONS) if case in FAR_CASES else near])


def tokens(case: str) -> np.ndarray:
    """Token ids [2, T]."""
    return (_uniform(len(case), (2, LENGTH)) * CASES[case]["vocab_size"]).astype(np.int32)


def _uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of [0, 1), the same on every machine and numpy."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(shape)


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes, written down by hand."""
    d, f, v = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    head = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention, mlp = (
        {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)},
        {"gate": (f, d), "up": (f, d), "down": (d, f)},
    )
    biased = "qkv" if config["model_type"] == "qwen2" else ("qkvo" if config.get("attention_bias") else "")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}self_attn.{name}_proj.bias": attention[name][:1] for name in biased}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": shape for name, shape in mlp.items()}
        if config.get("mlp_bias"):
            shapes |= {f"{prefix}mlp.{name}_proj.bias": shape[:1] for name, shape in mlp.items()}
        if config["model_type"] == "qwen3":
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (head,) for name in "qk"}
    return shapes


def tensors(config: Config) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face's names: gains in [0.5, 1.5), everything else in [-0.5, 0.5)."""
    return {
        name: (_uniform(seed, shape) + (0.5 if "norm" in name else -0.5)).astype(np.float32)
        for seed, (name, shape) in enumerate(tensor_shapes(config).items())
    }


def transformers_model(config: Config, arrays: dict[str, np.ndarray]) -> Any:
    """The model of transformers with these weights, in float32 on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(read, attn_implementation="eager", dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


def transformers_logits(model: Any, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] at given positions. The attention mask keeps transformers from reading jumps as packing."""
    import torch

    with torch.no_grad():
        out = model(
            torch.from_numpy(ids).long(),
            position_ids=torch.from_numpy(places).long(),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
        )
    return out.logits.float().numpy()


def main() -> None:
    os.environ["ATEN_CPU_CAPABILITY"] = "default"  # the SIMD versions of torch's power err by 1 ulp now and then
    golden = {}
    for case, config in CASES.items():
        model = transformers_model(config, tensors(config))
        golden[f"{case}.logits"] = transformers_logits(model, tokens(case), positions(case))[:, STORED]
        golden[f"{case}.inv_freq"] = model.model.rotary_emb.inv_freq.numpy()
        golden[f"{case}.attention_factor"] = np.float64(model.model.rotary_emb.attention_scaling)
    np.savez_compressed(FILE, **golden)


if __name__ == "__main__":
    main()
