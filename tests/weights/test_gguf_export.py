"""A GGUF file that is written here is what llama.cpp's converter writes, and comes back as the same model."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert_weights
from efx_jax.errors import InputError
from efx_jax.model.decoder import forward
from efx_jax.model.spec import ModelSpec, param_shapes, spec_from_config
from efx_jax.weights.gguf import open_gguf
from efx_jax.weights.gguf_export import export_gguf
from efx_jax.weights.gguf_tokenizer import gguf_tokenizer
from efx_jax.weights.hf import load_pretrained, load_tokenizer, save_pretrained
from efx_jax.weights.shapes import find_spec
from tests.tiny import save_tokenizer
from tests.weights.gguf_files import gguf_name
from tests.weights.test_gguf_tokenizer import golden_texts, tokenizer_file

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

N, K, H = 4, 2, 8
KIND_OF = {"llama": "llama2", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 200,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
}


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any], ModelSpec]]:
    """`make_model(model_type, kind, dtype, **config)`: a folder with weights and a tokenizer of a golden kind."""

    def make(model_type: str = "llama", kind: str | None = None, dtype: str = "float32", **config: Any) -> Any:
        sizes = {
            "vocab_size": 424,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": N,
            "num_key_value_heads": K,
            "head_dim": 4 if model_type == "qwen2" else H,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        spec = spec_from_config({"model_type": model_type, **sizes, **config})
        rng = np.random.default_rng(1)
        params = jax.tree.map(
            lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype),
            param_shapes(spec),
            is_leaf=lambda node: isinstance(node, tuple),
        )
        folder = tmp_path / "folder"
        save_pretrained(folder, params, spec)
        if kind != "none":
            source = tokenizer_file(tmp_path / "tokenizer.gguf", kind or KIND_OF[model_type])
            gguf_tokenizer(source).save_pretrained(folder)
        return folder, params, spec

    return make


def logits(params: Any, spec: ModelSpec) -> np.ndarray:
    tokens = jnp.arange(40)[None]
    return np.asarray(jax.jit(forward, static_argnums=2)(params, tokens, spec))


def test_a_pad_token_of_minus_one_is_none(make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": -1}
    (folder / "config.json").write_text(json.dumps(config))
    export_gguf(folder, tmp_path / "model.gguf", "float16")
    assert load_pretrained(tmp_path / "model.gguf")[1].pad_token_id != -1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_model_comes_back_with_the_same_logits(
    model_type: str, tied: bool, dtype: str, make_model: Callable, tmp_path: Path
) -> None:
    folder, params, spec = make_model(model_type, tie_word_embeddings=tied)
    export_gguf(folder, tmp_path / "model.gguf", dtype)
    read, found = load_pretrained(tmp_path / "model.gguf", dtype=None)
    assert dataclasses.replace(found, eos_token_ids=(), bos_token_id=1) == dataclasses.replace(
        spec, eos_token_ids=(), bos_token_id=1, pad_token_id=found.pad_token_id
    )
    # Vectors of a layer are stacked, those that stand alone have one axis.
    rounded = {
        name: leaf if name == "norm" else leaf.astype(dtype) for name, leaf in params.items() if name != "layers"
    }
    rounded["layers"] = {
        name: leaf if leaf.ndim == 2 else leaf.astype(dtype) for name, leaf in params["layers"].items()
    }
    assert jax.tree.map(lambda x: str(x.dtype), read) == jax.tree.map(lambda x: str(x.dtype), rounded)
    for found_leaf, leaf in zip(jax.tree.leaves(read), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(np.asarray(found_leaf, np.float32), np.asarray(leaf, np.float32))
    if dtype == "float16":
        np.testing.assert_array_equal(logits(read, found), logits(rounded, spec))


def test_file_is_laid_out_as_llama_cpp_has_it(make_model: Callable, tmp_path: Path) -> None:
    folder, params, _ = make_model("llama", attention_bias=True)
    export_gguf(folder, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, heads in (("q_proj", N), ("k_proj", K)):
        for leaf, suffix in ((name, "weight"), (f"{name}_bias", "bias")):
            tensor = stored[gguf_name(f"model.layers.1.self_attn.{name}.{suffix}")]
            ours = np.asarray(params["layers"][leaf][1])
            halves = np.split(ours.reshape(heads, H, -1), 2, axis=1)
            expected = np.stack(halves, axis=2).reshape(ours.shape)
            np.testing.assert_array_equal(tensor.data, expected.astype(tensor.data.dtype))
    kinds = {name: tensor.tensor_type.name for name, tensor in stored.items()}
    assert {kind for name, kind in kinds.items() if "norm" in name or name.endswith("bias")} == {"F32"}
    assert {kind for name, kind in kinds.items() if not ("norm" in name or name.endswith("bias"))} == {"F16"}
    assert "output.weight" in stored
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert (values["general.file_type"], values["general.quantization_version"]) == (1, 2)
    assert values["llama.attention.head_count_kv"] == K
    assert values["llama.rope.dimension_count"] == values["llama.attention.key_length"] == H
    assert values["llama.vocab_size"] == len(values["tokenizer.ggml.tokens"]) == 424
    assert values["tokenizer.ggml.tokens"][-1] == "[PAD423]"
    assert values["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED


@pytest.mark.parametrize("rope", list(ROPES))
def test_rotary_scaling_comes_back(rope: str, make_model: Callable, tmp_path: Path) -> None:
    folder, _, spec = make_model("qwen3", rope_parameters={**ROPES[rope], "rope_theta": 50000.0})
    export_gguf(folder, tmp_path / "model.gguf", "float32")
    found = spec_from_config(open_gguf(tmp_path / "model.gguf").config)
    expected = dataclasses.replace(spec.rope, original_max_position=found.rope.original_max_position)
    assert found.rope == (expected if rope in ("default", "linear") else spec.rope)


KINDS = ["gpt2", "llama3", "qwen2", "qwen3", "llama2", "llama2_no_bos", "llama2_eos", "no_pre"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_comes_back_with_the_same_ids(kind: str, make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama", kind)
    export_gguf(folder, tmp_path / "model.gguf")
    ours, theirs = load_tokenizer(tmp_path / "model.gguf"), load_tokenizer(folder)
    texts = golden_texts()
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    for name in ("bos", "eos", "unk", "pad"):
        before = getattr(theirs, f"{name}_token_id")
        assert getattr(ours, f"{name}_token_id") == (before if before is not None else {"bos": 1, "eos": 2}.get(name))


@pytest.mark.parametrize(
    ("kind", "pre"), [("gpt2", "gpt-2"), ("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("llama2", "default")]
)
def test_split_pattern_has_llama_cpp_s_name(kind: str, pre: str, make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama", kind)
    export_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre


def test_llama_3_without_its_exception_to_merges_has_another_name(make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama", "llama3")
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    written["model"]["ignore_merges"] = False
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    export_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smaug-bpe"
    assert not load_tokenizer(tmp_path / "model.gguf").backend_tokenizer.model.ignore_merges


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_unknown_text_has_a_token_of_its_own_type(declared: str, make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama", "llama2")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": declared}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    export_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    types = dict(zip(*(fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type")), strict=True))
    assert [types[token] for token in ("<unk>", "<s>", "</s>")] == [2, 3, 3]


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_tokenizer_that_cuts_at_digits_is_named_smollm(declared: str, make_model: Callable, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    folder, _, _ = make_model("llama", "gpt2")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": declared}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    export_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"),
        ("models--Qwen--Qwen3-0.6B/snapshots/c0ffee", "Qwen3-0.6B"),
        ("runs/mine-0.5/export", "mine-0.5"),
    ],
)
def test_the_file_is_named_after_the_model(path: str, name: str, make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama")
    (tmp_path / path).parent.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "/home/somebody/base"}
    (folder / "config.json").write_text(json.dumps(config))
    folder.rename(tmp_path / path)
    export_gguf(tmp_path / path, tmp_path / "a-1.5.f16.gguf")
    export_gguf(tmp_path / "a-1.5.f16.gguf", tmp_path / "b.gguf")
    found = [
        gguf.GGUFReader(tmp_path / file).fields["general.name"].contents() for file in ("a-1.5.f16.gguf", "b.gguf")
    ]
    assert found == [name, "a-1.5.f16"]


def test_a_file_of_16_bits_is_described_as_one(make_model: Callable, tmp_path: Path) -> None:
    export_gguf(make_model("llama")[0], tmp_path / "model.gguf", "bfloat16")
    assert find_spec(tmp_path / "model.gguf").dtype == "bfloat16"


def test_gguf_file_keeps_its_own_tokenizer(make_model: Callable, tmp_path: Path) -> None:
    folder, _, _ = make_model("llama", "llama2")
    export_gguf(folder, tmp_path / "first.gguf", "float32")
    assert (
        convert_weights.main(["export", str(tmp_path / "first.gguf"), str(tmp_path / "b.gguf"), "--format", "gguf"])
        == 0
    )
    first, second = (gguf.GGUFReader(tmp_path / name).fields for name in ("first.gguf", "b.gguf"))
    names = [name for name in first if name.startswith("tokenizer.")]
    assert len(names) > 8
    for name in names:
        assert second[name].contents() == first[name].contents()
        assert second[name].types == first[name].types


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {**ROPES["yarn"], "attention_factor": 1.5}}, "yarn's attention factor is 1.5"),
        ({"rope_parameters": {**ROPES["yarn"], "truncate": False}}, "yarn with truncate false"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases of k_proj, o_proj, q_proj, v_proj are unknown"),
        ({"model_type": "qwen2", "head_dim": 8}, "head_dim 8 times num_attention_heads 4 is not hidden_size 16"),
        ({"kind": "none"}, "no tokenizer that transformers can load"),
    ],
)
def test_what_has_no_form_in_the_file_is_refused_by_name(
    config: dict[str, Any], words: str, make_model: Callable, tmp_path: Path
) -> None:
    folder, _, _ = make_model(**config)
    _assert_refused(folder, tmp_path / "model.gguf", words)


def _assert_refused(folder: Path, dst: Path, words: str) -> None:
    before = sorted(os.listdir(dst.parent))
    with pytest.raises(InputError, match=words) as caught:
        export_gguf(folder, dst)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(dst.parent)) == before


def test_tokenizers_that_llama_cpp_lacks_are_refused(make_model: Callable, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    folder, _, _ = make_model("llama", "llama3")
    file = str(folder / "tokenizer.json")
    whole = Tokenizer.from_file(file)
    other = Tokenizer.from_file(file)
    split = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    other.save(file)
    _assert_refused(folder, tmp_path / "model.gguf", "cuts texts in a way that has no name in llama.cpp")
    whole.normalizer = normalizers.Lowercase()
    whole.save(file)
    _assert_refused(folder, tmp_path / "model.gguf", "normalizer Lowercase is unknown to llama.cpp")
    save_tokenizer(folder)
    _assert_refused(folder, tmp_path / "model.gguf", "no WordLevel tokenizer")


def test_numbers_and_places_that_do_not_fit_are_refused(make_model: Callable, tmp_path: Path) -> None:
    folder, params, spec = make_model("llama")
    params["layers"]["up_proj"] = params["layers"]["up_proj"].at[1, 2, 3].set(1e5)
    save_pretrained(tmp_path / "large", params, spec, source=folder)
    _assert_refused(tmp_path / "large", tmp_path / "model.gguf", "layers.1.mlp.up_proj.weight exceeds float16")
    _assert_refused(folder, tmp_path / "model.bin", "ends in .gguf")
    (tmp_path / "there.gguf").write_text("x")
    _assert_refused(folder, tmp_path / "there.gguf", "exists already")
    flags = ["--format", "gguf", "--max-shard-size", "1GB"]
    assert convert_weights.main(["export", str(folder), str(tmp_path / "model.gguf"), *flags]) == 2


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model_from_the_file(model_type: str, make_model: Callable, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Of a Qwen3 file transformers reads no head width but takes 128.
    folder, _, _ = make_model(model_type, **({"head_dim": 128} if model_type == "qwen3" else {}))
    export_gguf(folder, tmp_path / "model.gguf", "float32")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)
