"""PEFT folders written by hand for the tiny models of `tests/tiny.py`, and what they mean, by NumPy."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from efx_jax.model.spec import ModelSpec, linear_shapes

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
Tensors = dict[str, np.ndarray]


def module(layer: int, name: str, head: str = "model.") -> str:
    return f"{head}layers.{layer}.{'mlp' if name in LINEARS[4:] else 'self_attn'}.{name}"


def tensors_for(
    spec: ModelSpec,
    rank_of: Callable[[int, str], int | None],
    key: str = "base_model.model.{module}.lora_{half}.weight",
    head: str = "model.",
    dtype: str = "float32",
) -> Tensors:
    """Random A and B of every linear to which `rank_of(layer, name)` gives a rank."""
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for layer in range(spec.num_layers):
        for name, (out_dim, in_dim) in linear_shapes(spec).items():
            rank = rank_of(layer, name)
            if rank is not None:
                for half, shape in (("A", (rank, in_dim)), ("B", (out_dim, rank))):
                    values = rng.standard_normal(shape).astype(DTYPES[dtype])
                    tensors[key.format(module=module(layer, name, head), half=half)] = values
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **options: Any) -> Path:
    """A PEFT folder of those tensors; r is 3 and lora_alpha 6 unless the options say otherwise, None leaves one out."""
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(LINEARS), "bias": "none"} | options
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def delta(tensors: Mapping[str, np.ndarray], layer: int, name: str, scale: float, head: str = "model.") -> np.ndarray:
    """scale * B A of one linear, float64 `[O,I]`."""
    found = {
        key.split(".lora_")[1][0]: value.astype(np.float64)
        for key, value in tensors.items()
        if f"{module(layer, name, head)}.lora_" in key
    }
    return scale * found["B"] @ found["A"]
