"""The rotary scaling of a GGUF file: read from its metadata, or recovered from its factors."""

import math
from pathlib import Path

import numpy as np
import pytest

from efx_jax.model.spec import spec_from_config
from efx_jax.weights.gguf import open_gguf
from tests.weights.gguf_files import H, gguf_tensors, hf_tensors, metadata_for, refusal, tiny_model, write_gguf


def llama3_factors(theta: float, width: int, factor: float, original: int) -> np.ndarray:
    """The loop over float32 frequencies with which llama.cpp's converter fills rope_freqs.weight."""
    factors = []
    for frequency in 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / width):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("width", "factor", "original"), [(128, 8.0, 8192), (64, 32.0, 8192), (128, 16.0, 4096), (128, 4.0, 20000)]
)
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path, width: int, factor: float, original: int) -> None:
    metadata = metadata_for("llama") | {
        f"llama.{key}": width for key in ("attention.key_length", "rope.dimension_count")
    }
    metadata["llama.attention.value_length"] = width
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["rope_freqs.weight"] = llama3_factors(500000.0, width, factor, original)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors))
    assert source.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    assert "rope_freqs" not in "".join(source.shapes)


def test_rope_factors_of_another_rule_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["rope_freqs.weight"] = np.linspace(1, 8, H // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), tensors)
    assert "rope_freqs.weight" in refusal(path)


def test_rope_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama")) | {"rope_freqs.weight": np.ones(H // 2, np.float32)}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), tensors))
    assert source.config["rope_parameters"]["rope_type"] == "default"


def test_linear_and_yarn_scaling_are_read(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    config = open_gguf(tiny_model(tmp_path / "l.gguf", **linear)).config
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}
    # As llama.cpp, which takes a factor without a type as linear.
    del linear["rope.scaling.type"]
    assert open_gguf(tiny_model(tmp_path / "f.gguf", **linear)).config == config
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    rope = spec_from_config(open_gguf(tiny_model(tmp_path / "y.gguf", "qwen2", **yarn)).config).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32)
