"""Small Hugging Face checkpoints, named and shaped here by hand and not by the code under test."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.quick import quick_compilation

Tensors = dict[str, np.ndarray]
NUMPY_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def _config(model_type: str, tied: bool, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[model_type] + "ForCausalLM"],
        "model_type": model_type,
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "rope_theta": 50000.0,
        "torch_dtype": dtype,
        "a_key_of_its_own": {"kept": True},
    }


def _shapes(model_type: str, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    if not tied:
        shapes["lm_head.weight"] = (40, 16)
    for layer in range(3):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            shapes[f"{attention}.{name}.weight"] = (rows, 16)
            if model_type == "qwen2":
                shapes[f"{attention}.{name}.bias"] = (rows,)
        shapes[f"{attention}.o_proj.weight"] = (16, 32)
        if model_type == "qwen3":
            shapes[f"{attention}.q_norm.weight"] = shapes[f"{attention}.k_norm.weight"] = (8,)
        shapes |= {f"{mlp}.gate_proj.weight": (24, 16), f"{mlp}.up_proj.weight": (24, 16)}
        shapes[f"{mlp}.down_proj.weight"] = (16, 24)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (16,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (16,)
    return shapes


@pytest.fixture
def make_tensors() -> Callable[..., Tensors]:
    """`make_tensors(model_type, tied, dtype)`: random tensors under Hugging Face's names."""

    def make(model_type: str = "llama", tied: bool = False, dtype: str = "float32") -> Tensors:
        rng = np.random.default_rng(0)
        shapes = _shapes(model_type, tied)
        return {name: rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype]) for name, shape in shapes.items()}

    return make


@pytest.fixture
def make_folder(tmp_path: Path, make_tensors: Callable[..., Tensors]) -> Callable[..., Path]:
    """`make_folder(name, model_type, tied, dtype, tensors, shards, config)`: a Hugging Face folder."""

    def make(
        name: str = "hf",
        model_type: str = "llama",
        tied: bool = False,
        dtype: str = "float32",
        tensors: Tensors | None = None,
        shards: int = 1,
        config: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = _config(model_type, tied, dtype) | (config or {})
        (folder / "config.json").write_text(json.dumps(config))
        tensors = make_tensors(model_type, tied, dtype) if tensors is None else tensors
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            names = list(tensors)[shard::shards]
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture
def read_folder() -> Callable[[Path], Tensors]:
    """`read_folder(folder)`: every tensor of a folder's safetensors files, by the safetensors library."""
    from safetensors import safe_open

    def read(folder: Path) -> Tensors:
        tensors: Tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors

    return read


@pytest.fixture
def assert_same_bytes() -> Callable[[Tensors, Tensors], None]:
    """`assert_same_bytes(found, expected)`: the same names, dtypes, shapes and bytes."""

    def check(found: Tensors, expected: Tensors) -> None:
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            assert found[name].tobytes() == tensor.tobytes(), name

    return check
