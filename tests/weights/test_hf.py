import errno
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efx_jax.errors import InputError
from efx_jax.model.spec import param_shapes, spec_from_config
from efx_jax.weights.assemble import assemble
from efx_jax.weights.config_json import declare_stops
from efx_jax.weights.hf import load_pretrained, load_tokenizer, open_folder, save_pretrained

MODEL_TYPES = ("llama", "qwen2", "qwen3")
DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_lands_in_its_place(model_type: str, make_folder: Callable, make_tensors: Callable) -> None:
    params, spec = load_pretrained(make_folder(model_type=model_type))
    tensors = make_tensors(model_type)
    layers = params["layers"]
    shapes = jax.tree.map(lambda array: tuple(array.shape), params)
    assert shapes == param_shapes(spec)
    np.testing.assert_array_equal(params["embed_tokens"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"], tensors["lm_head.weight"])
    for layer in range(3):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            expected = tensors[f"model.layers.{layer}.self_attn.{name}.weight"]
            np.testing.assert_array_equal(params["layers"][name][layer], expected)
        for name in ("gate_proj", "up_proj", "down_proj"):
            np.testing.assert_array_equal(layers[name][layer], tensors[f"model.layers.{layer}.mlp.{name}.weight"])
    if model_type == "qwen2":
        np.testing.assert_array_equal(layers["k_proj_bias"][2], tensors["model.layers.2.self_attn.k_proj.bias"])
    if model_type == "qwen3":
        np.testing.assert_array_equal(layers["k_norm"][1], tensors["model.layers.1.self_attn.k_norm.weight"])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_export_of_untouched_tensors_is_byte_identical(
    model_type: str,
    tied: bool,
    dtype: str,
    shards: int,
    make_folder: Callable,
    read_folder: Callable,
    assert_same_bytes: Callable,
    tmp_path: Path,
) -> None:
    src = make_folder(model_type=model_type, tied=tied, dtype=dtype, shards=shards)
    params, spec = load_pretrained(src, dtype=None)
    save_pretrained(tmp_path / "out", params, spec, source=src, max_shard_bytes=10**9 if shards == 1 else 4000)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) == 1) == (shards == 1)
    assert_same_bytes(read_folder(tmp_path / "out"), read_folder(src))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_converts_to_the_dtype_asked_for(dtype: str, make_folder: Callable, make_tensors: Callable) -> None:
    params, _ = load_pretrained(make_folder(), dtype=dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    expected = make_tensors()["model.norm.weight"].astype(params["norm"].dtype)
    np.testing.assert_array_equal(params["norm"], expected)


def test_layers_of_different_dtype_become_float32_exactly(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors(dtype="bfloat16")
    mixed = "model.layers.1.self_attn.q_proj.weight"
    tensors[mixed] = np.linspace(-1, 1, 32 * 16, dtype=np.float32).reshape(32, 16)
    params, _ = load_pretrained(make_folder(tensors=tensors), dtype=None)
    assert str(params["layers"]["q_proj"].dtype) == "float32"
    assert str(params["layers"]["k_proj"].dtype) == "bfloat16"
    np.testing.assert_array_equal(params["layers"]["q_proj"][1], tensors[mixed])
    np.testing.assert_array_equal(
        params["layers"]["q_proj"][0], tensors["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
    )


def test_number_beyond_float16_is_refused_by_name(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors(dtype="bfloat16")
    tensors["model.norm.weight"][3] = 1e6
    folder = make_folder(tensors=tensors)
    with pytest.raises(InputError, match="model.norm.weight exceeds float16"):
        load_pretrained(folder, dtype="float16")


def test_loading_holds_two_leaves_and_a_tensor_beside_the_tree(make_folder: Callable) -> None:
    layers, width = 6, 256
    square, row = np.ones((width, width), np.float32), np.ones(width, np.float32)
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    tensors = {"model.embed_tokens.weight": square[:40].copy(), "model.norm.weight": row}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": square.copy() for name in attention + mlp}
        tensors |= {f"model.layers.{layer}.{name}.weight": row.copy() for name in norms}
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "head_dim": width // 4}
    source = open_folder(make_folder(tied=True, tensors=tensors, config={**sizes, "num_key_value_heads": 4}))
    # numpy reports its memory to tracemalloc, jax only what it shares with numpy, which is still there at the end.
    tracemalloc.start()
    params = assemble(source, spec_from_config(source.config), None)
    at_the_end, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # jax lets the last leaf's buffer go only when it is called again, so that one is counted too.
    assert peak - at_the_end < 2.5 * params["layers"]["q_proj"].nbytes


def test_a_tensor_in_two_shards_is_refused(make_folder: Callable) -> None:
    folder = make_folder(shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    held = load_file(second)
    name = next(iter(load_file(first)))
    save_file(held | {name: load_file(first)[name]}, second)
    with pytest.raises(InputError, match=f"tensor {re.escape(name)} is in {first.name} too"):
        open_folder(folder)


def test_rotary_buffers_of_old_checkpoints_are_ignored(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load_pretrained(make_folder(tensors=tensors))


def test_tied_head_is_accepted_only_if_it_is_the_embedding(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors(tied=True)
    head = tensors["model.embed_tokens.weight"].copy()
    params, _ = load_pretrained(make_folder("equal", tied=True, tensors={**tensors, "lm_head.weight": head}))
    assert "lm_head" not in params
    head[5, 5] += 1
    with pytest.raises(InputError, match="lm_head.weight differs"):
        load_pretrained(make_folder("differs", tied=True, tensors={**tensors, "lm_head.weight": head}))


def test_pickled_checkpoint_is_refused_with_the_reason(make_folder: Callable) -> None:
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle, which can run code"):
        load_pretrained(folder)


def test_integer_tensor_is_refused_by_name(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    with pytest.raises(InputError, match=r"model\.norm\.weight has dtype I32"):
        load_pretrained(make_folder(tensors=tensors))


def test_a_quantised_folder_is_refused_as_one(make_folder: Callable, make_tensors: Callable) -> None:
    tensors = make_tensors()
    tensors["model.layers.0.self_attn.q_proj.qweight"] = np.zeros((4, 16), np.int32)
    folder = make_folder(tensors=tensors, config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(InputError, match="quantised safetensors are not supported; use the unquantised checkpoint"):
        load_pretrained(folder)


@pytest.mark.parametrize("largest", [39, 40])
def test_tokenizer_may_not_be_larger_than_the_embedding(largest: int, make_folder: Callable) -> None:
    folder = make_folder()
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": largest, "content": "<new>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if largest < 40:
        open_folder(folder)
        return
    with pytest.raises(InputError, match="token id 40, but the embedding has 40 rows"):
        open_folder(folder)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": [1]},
        {"model": {"vocab": 3}},
        {"model": {"vocab": {"a": "0"}}},
        {"added_tokens": [{"content": "<new>"}]},
        {"added_tokens": [{"id": "3", "content": "<new>"}]},
        {"added_tokens": 3},
    ],
)
def test_a_garbled_tokenizer_json_is_named(tokenizer: dict, make_folder: Callable) -> None:
    folder = make_folder()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokenizer.json: is no tokenizer's; expected .* with integer ids") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_run_folder_stands_for_its_export(make_folder: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(InputError, match="is a run without export"):
        load_pretrained(run)
    make_folder().rename(run / "export")
    load_pretrained(run)


def test_head_is_never_written_when_it_is_tied(make_folder: Callable, read_folder: Callable, tmp_path: Path) -> None:
    params, spec = load_pretrained(make_folder(tied=True))
    save_pretrained(tmp_path / "out", params, spec)
    assert "lm_head.weight" not in read_folder(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


OLD = {"rope_theta": 50000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
NEW = {
    "rope_theta": None,
    "torch_dtype": None,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
    "dtype": "float32",
}


@pytest.mark.parametrize("schema", [OLD, NEW], ids=["old", "new"])
def test_old_and_new_schema_are_both_written(schema: dict, make_folder: Callable, tmp_path: Path) -> None:
    src = make_folder(config=schema)
    params, spec = load_pretrained(src)
    save_pretrained(tmp_path / "out", params, spec, source=src)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_theta"] == 50000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["a_key_of_its_own"] == {"kept": True}
    assert spec_from_config(config) == spec


def test_wide_tensors_come_first_so_that_all_are_aligned(
    make_folder: Callable, make_tensors: Callable, tmp_path: Path
) -> None:
    tensors = make_tensors(dtype="bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    params, spec = load_pretrained(make_folder(tensors=tensors), dtype=None)
    save_pretrained(tmp_path / "out", params, spec)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for entry in header.values():
        assert entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_small_files_travel_and_code_and_pickles_stay(make_folder: Callable, tmp_path: Path) -> None:
    src = make_folder()
    travel = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE.txt")
    for name in (*travel, "modeling_custom.py", "pytorch_model.bin", "README.md"):
        (src / name).write_text("{}")
    params, spec = load_pretrained(src)
    save_pretrained(tmp_path / "out", params, spec, source=src)
    assert set(os.listdir(tmp_path / "out")) == {*travel, "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("before", "stops", "after"),
    [
        (None, {1}, None),
        (None, {7, 1, 5}, {"eos_token_id": [1, 5, 7], "bos_token_id": 0}),
        ({"eos_token_id": 7, "top_k": 3}, {7}, {"eos_token_id": 7, "top_k": 3}),
        ({"eos_token_id": [1, 7]}, {5}, {"eos_token_id": [1, 7, 5]}),
        ({"top_k": 3}, {5}, {"eos_token_id": [1, 5], "top_k": 3}),
    ],
)
def test_generation_is_told_of_the_tokens_that_answers_end_with(
    make_folder: Callable, before: dict | None, stops: set[int], after: dict | None
) -> None:
    folder = make_folder(config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None})
    path = folder / "generation_config.json"
    if before is not None:
        path.write_text(json.dumps(before))
    declare_stops(folder, stops)
    assert (json.loads(path.read_text()) if path.exists() else None) == after


def test_an_export_describes_the_rope_that_was_run(make_folder: Callable, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    other = {**yarn, "rope_theta": 10000.0, "attention_factor": 1.0}
    params, spec = load_pretrained(src := make_folder(config={"rope_scaling": yarn, "rope_parameters": other}))
    save_pretrained(tmp_path / "out", params, spec, source=src)
    assert spec_from_config(json.loads((tmp_path / "out" / "config.json").read_text())) == spec


def test_source_of_another_model_is_refused(make_folder: Callable, tmp_path: Path) -> None:
    params, spec = load_pretrained(make_folder())
    other = make_folder("other", config={"rope_theta": 10000.0})
    with pytest.raises(InputError, match="source config.json: rope is"):
        save_pretrained(tmp_path / "out", params, spec, source=other)
    assert not (tmp_path / "out").exists()


def test_params_of_another_shape_are_refused(make_folder: Callable, tmp_path: Path) -> None:
    params, spec = load_pretrained(make_folder())
    params["norm"] = params["norm"][:-1]
    with pytest.raises(InputError, match=re.escape("norm is [15], expected [16]")):
        save_pretrained(tmp_path / "out", params, spec)
    assert not (tmp_path / "out").exists()


def test_full_disk_while_exporting_leaves_nothing(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, spec = load_pretrained(make_folder())

    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("efx_jax.weights.hf.fill", full)
    with pytest.raises(InputError, match="the disk is full"):
        save_pretrained(tmp_path / "out", params, spec)
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_folder_without_tokenizer_is_named(make_folder: Callable) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="no tokenizer that transformers can load") as caught:
        load_tokenizer(make_folder())
    assert "\n" not in str(caught.value)


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
}


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_opens_the_export(model_type: str, rope: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.AutoConfig.for_model(
        model_type,
        **sizes,
        **heads,
        rope_parameters={**ROPES[rope], "rope_theta": 50000.0},
        tie_word_embeddings=rope in ("linear", "yarn"),
    )
    original = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    original.save_pretrained(tmp_path / "hf")
    params, spec = load_pretrained(tmp_path / "hf", dtype=None)
    save_pretrained(tmp_path / "with_source", params, spec, source=tmp_path / "hf", max_shard_bytes=10_000)
    save_pretrained(tmp_path / "without_source", params, spec)
    assert len(list((tmp_path / "with_source").glob("*.safetensors"))) > 1
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = original(tokens).logits
        for name in ("with_source", "without_source"):
            exported, report = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / name, output_loading_info=True
            )
            assert not report["missing_keys"] and not report["unexpected_keys"]
            assert exported.dtype == original.dtype
            torch.testing.assert_close(exported(tokens).logits, expected, rtol=0, atol=0)


def test_an_adapter_named_as_a_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a PEFT adapter, no model; .* --lora\.adapter"):
        open_folder(tmp_path)
