"""Quantised blocks of a GGUF file become the float32 that ggml means."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from efx_jax.weights.gguf import open_gguf
from efx_jax.weights.gguf_file import QUANTIZED_TYPES
from tests.weights.gguf_files import F, H, N, Tensors, gguf_tensors, hf_tensors, interleave, metadata_for, write_gguf

gguf = pytest.importorskip("gguf")


def random_blocks(type_name: str, rows: int, columns: int) -> np.ndarray:
    """Random bytes whose 16-bit scales are ordinary numbers: `[rows, bytes of a row]`."""
    scale_offsets = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (rows * columns // block, block_bytes), np.uint8)
    for offset in {"Q6_K": (208,)}.get(type_name) or scale_offsets.get(type_name, (0,)):
        scales = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def quantized_model(path: Path, type_name: str) -> tuple[Path, Tensors]:
    """A llama whose q and up are random blocks, 256 wide."""
    metadata = metadata_for("llama") | {"llama.embedding_length": 256, "llama.block_count": 1}
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blk.1.")}
    raw = {name: random_blocks(type_name, rows, 256) for name, rows in (("attn_q", N * H), ("ffn_up", F))}
    raw = {f"blk.0.{name}.weight": blocks for name, blocks in raw.items()}
    write_gguf(path, "llama", metadata, tensors | raw, dict.fromkeys(raw, type_name))
    return path, raw


@pytest.mark.parametrize("type_name", QUANTIZED_TYPES)
def test_blocks_become_the_float32_of_gguf(tmp_path: Path, type_name: str) -> None:
    path, raw = quantized_model(tmp_path / "m.gguf", type_name)
    source = open_gguf(path)
    kind = gguf.GGMLQuantizationType[type_name]
    up, query = source.read("model.layers.0.mlp.up_proj.weight"), source.read("model.layers.0.self_attn.q_proj.weight")
    assert up.dtype == query.dtype == np.float32
    assert source.dtypes["model.layers.0.mlp.up_proj.weight"] == "float32"
    np.testing.assert_array_equal(up, gguf.dequantize(raw["blk.0.ffn_up.weight"], kind))
    np.testing.assert_array_equal(interleave(query, N), gguf.dequantize(raw["blk.0.attn_q.weight"], kind))
    assert np.isfinite(up).all() and np.unique(up).size > 100


def q4_1(block: np.ndarray) -> list[float]:
    scale, least = block[:4].view(np.float16).astype(np.float32)
    return [scale * q + least for q in [*(block[4:] & 15), *(block[4:] >> 4)]]


def q8_0(block: np.ndarray) -> list[float]:
    return [block[:2].view(np.float16).astype(np.float32)[0] * q for q in block[2:].view(np.int8)]


def q6_k(block: np.ndarray) -> list[float]:
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    scale = block[208:].view(np.float16).astype(np.float32)[0]
    values = []
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, column = divmod(rest, 32)
        nibble = low[64 * half + 32 * (quarter % 2) + column] >> (4 * (quarter // 2)) & 15
        top = high[32 * half + column] >> (2 * quarter) & 3
        values.append(scale * np.float32(scales[i // 16]) * (int(nibble) + 16 * int(top) - 32))
    return values


@pytest.mark.parametrize(
    ("type_name", "size", "formula"), [("Q4_1", 20, q4_1), ("Q8_0", 34, q8_0), ("Q6_K", 210, q6_k)]
)
def test_blocks_follow_the_formula_of_ggml(
    tmp_path: Path, type_name: str, size: int, formula: Callable[[np.ndarray], list[float]]
) -> None:
    path, raw = quantized_model(tmp_path / "m.gguf", type_name)
    found = open_gguf(path).read("model.layers.0.mlp.up_proj.weight")
    expected = [value for block in raw["blk.0.ffn_up.weight"].reshape(-1, size) for value in formula(block)]
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-6, atol=1e-7)


def test_large_tensor_is_unpacked_in_pieces_without_a_seam(tmp_path: Path) -> None:
    rows = 5000
    tensors = gguf_tensors("llama", hf_tensors("llama")) | {"token_embd.weight": random_blocks("Q8_0", rows, 1024)}
    raw = {"token_embd.weight": "Q8_0"}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), tensors, raw))
    expected = gguf.dequantize(tensors["token_embd.weight"], gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight"), expected)
