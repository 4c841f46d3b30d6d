"""A GGUF file reads as the Hugging Face checkpoint that it was made from."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.model.spec import spec_from_config
from efx_jax.weights.gguf import open_gguf
from efx_jax.weights.gguf_file import QUANTIZED_TYPES
from efx_jax.weights.source import check_names_and_shapes

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_smollm2.json"
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


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: Tensors,
    raw_types: dict[str, str] | None = None,
) -> Path:
    """Writes a file; `raw_types` names the quantisation type of those tensors that are given as raw bytes."""
    writer = gguf.GGUFWriter(path, architecture)
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


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_come_back_in_hugging_face_layout(tmp_path: Path, architecture: str, tied: bool) -> None:
    tensors = hf_tensors(architecture, tied)
    stored = gguf_tensors(architecture, tensors)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", architecture, metadata_for(architecture), stored))
    check_names_and_shapes(source, spec_from_config(source.config))
    assert set(source.shapes) == set(tensors)
    assert source.config["tie_word_embeddings"] is tied
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor, err_msg=name)


def test_rotary_rows_of_a_llama_really_move(tmp_path: Path) -> None:
    tensors = hf_tensors("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(gguf_tensors("llama", tensors)["blk.0.attn_q.weight"], tensors[name])


def test_biases_of_a_llama_are_read_and_put_back_in_order(tmp_path: Path) -> None:
    tensors = hf_tensors("llama")
    rng = np.random.default_rng(1)
    for i in range(L):
        for name, size in {"q": N * H, "k": K * H, "v": K * H, "o": D}.items():
            tensors[f"model.layers.{i}.self_attn.{name}_proj.bias"] = rng.standard_normal(size, "float32")
    stored = gguf_tensors("llama", tensors)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), stored))
    assert spec_from_config(source.config).biases == ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor, err_msg=name)


def test_config_holds_the_numbers_that_config_json_had(tmp_path: Path) -> None:
    config = open_gguf(tiny_model(tmp_path / "m.gguf")).config
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    spec = spec_from_config(config)
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (D, L, N, K)
    assert (spec.head_dim, spec.intermediate_size, spec.vocab_size, spec.max_position_embeddings) == (H, F, V, 128)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2,), None)


@pytest.mark.parametrize(("type_name", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_float_tensors_keep_their_dtype(tmp_path: Path, type_name: str, dtype: str) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    data = gguf.quants.quantize(tensors["blk.0.attn_q.weight"], gguf.GGMLQuantizationType[type_name])
    stored = tensors | {"blk.0.attn_q.weight": data}
    raw = {"blk.0.attn_q.weight": type_name}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), stored, raw))
    name = "model.layers.0.self_attn.q_proj.weight"
    found = source.read(name)
    assert source.dtypes[name] == str(found.dtype) == dtype
    np.testing.assert_array_equal(found, hf_tensors("llama")[name].astype(found.dtype))


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
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    rope = spec_from_config(open_gguf(tiny_model(tmp_path / "y.gguf", "qwen2", **yarn)).config).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.dimension_count", H // 2),
        ("attention.value_length", 2 * H),
        ("attention.sliding_window", 64),
        ("expert_count", 8),
        ("logit_scale", 0.5),
        ("feed_forward_length", [F, 2 * F]),
    ],
)
def test_option_that_changes_the_model_is_refused_by_name(tmp_path: Path, option: str, value: Any) -> None:
    assert option in refusal(tiny_model(tmp_path / "m.gguf", **{option: value}))


@pytest.mark.parametrize("value", [0, "two"])
def test_size_that_is_not_a_positive_number_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    assert "block_count" in refusal(tiny_model(tmp_path / "m.gguf", block_count=value))


def test_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gemma2", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    assert "'gemma2'" in refusal(path)


def test_unsupported_quantisation_is_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama", hf_tensors("llama"))
    tensors["blk.0.ffn_up.weight"] = np.zeros((F, 66), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata_for("llama"), tensors, {"blk.0.ffn_up.weight": "IQ2_XXS"})
    message = refusal(path)
    assert "IQ2_XXS" in message and "blk.0.ffn_up.weight" in message


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors("qwen3", hf_tensors("qwen3"))
    del tensors["blk.1.attn_k_norm.weight"]
    path = write_gguf(tmp_path / "missing.gguf", "qwen3", metadata_for("qwen3"), tensors)
    assert "'blk.1.attn_k_norm.weight' is missing" in refusal(path)
    tensors = gguf_tensors("llama", hf_tensors("llama")) | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = write_gguf(tmp_path / "unknown.gguf", "llama", metadata_for("llama"), tensors)
    assert "'blk.0.attn_sinks.weight'" in refusal(path)


def test_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert "no such file" in refusal(path)
    for content in (b"", b"GG", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big"))
    assert "version" in refusal(path)


def test_truncated_file_is_refused_with_one_line(tmp_path: Path) -> None:
    whole = tiny_model(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(4, 3000, 7), len(whole) - 33, len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "truncated" in refusal(path)


def test_damaged_header_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    whole = np.frombuffer(tiny_model(tmp_path / "m.gguf").read_bytes(), np.uint8)
    path = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(3)
    messages = []
    for _ in range(500):
        damaged = whole.copy()
        damaged[rng.integers(4, 3000)] = rng.integers(0, 256)
        path.write_bytes(damaged.tobytes())
        try:
            open_gguf(path)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


def smollm2() -> Path:
    path = Path(os.environ.get("EFX_SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("EFX_SMOLLM2_GGUF does not name a file")
    return path


def test_smollm2_is_what_transformers_reads() -> None:
    source = open_gguf(smollm2())
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for name in sorted(source.shapes):
        digest.update(name.encode() + source.read(name).tobytes())
    assert digest.hexdigest() == golden["sha256"]
    assert {name: source.config[name] for name in golden["config"]} == golden["config"]


def test_smollm2_equals_transformers_bit_for_bit() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = smollm2()
    config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    source = open_gguf(path)
    assert set(source.shapes) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy(), err_msg=name)
