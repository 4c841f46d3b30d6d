"""A GGUF file reads as the Hugging Face checkpoint that it was made from."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from efx_jax.model.spec import spec_from_config
from efx_jax.weights.gguf import open_gguf
from efx_jax.weights.source import check_names_and_shapes
from tests.weights.gguf_files import (
    D,
    F,
    H,
    K,
    L,
    N,
    V,
    gguf_tensors,
    hf_tensors,
    metadata_for,
    smollm2,
    tiny_model,
    write_gguf,
)

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_smollm2.json"


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
