"""What is read from a config.json, what is written, and what is refused by name."""

import copy
import dataclasses
import math
from typing import Any

import jax
import pytest

from efx_jax.errors import InputError
from efx_jax.model.rope import RopeSpec, yarn_attention_factor
from efx_jax.model.spec import (
    LINEARS,
    ModelSpec,
    config_from_spec,
    init_params,
    linear_shapes,
    param_shapes,
    spec_from_config,
)

Config = dict[str, Any]

# The public config.json of Llama-3.2-1B-Instruct, Qwen2.5-0.5B and Qwen3-0.6B.
LLAMA32: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN25: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
REAL = {"llama": LLAMA32, "qwen2": QWEN25, "qwen3": QWEN3}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


def new_schema(config: Config) -> Config:
    """The same model as transformers 5 writes it."""
    new = copy.deepcopy(config)
    rope = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = {**rope, "rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    return new


def count_parameters(spec: ModelSpec) -> int:
    return sum(
        math.prod(shape) for shape in jax.tree.leaves(param_shapes(spec), is_leaf=lambda x: isinstance(x, tuple))
    )


def test_llama_32_is_read() -> None:
    assert spec_from_config(LLAMA32) == ModelSpec(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope=RopeSpec("llama3", 500000.0, 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_qwen_25_has_three_biases_and_a_derived_head() -> None:
    spec = spec_from_config(QWEN25)
    assert spec.biases == ("q_proj", "k_proj", "v_proj") and not spec.qk_norm
    assert (spec.head_dim, spec.rope.rope_type, spec.rope.theta, spec.eos_token_ids) == (64, "default", 1e6, (151643,))


def test_qwen_3_has_head_norms_and_a_head_of_its_own() -> None:
    spec = spec_from_config(QWEN3)
    assert spec.qk_norm and spec.biases == ()
    assert spec.head_dim == 128 != spec.hidden_size // spec.num_heads
    assert linear_shapes(spec)["o_proj"] == (1024, 2048)


# The totals that the model cards print: 1.24 B, 0.49 B and 0.6 B.
@pytest.mark.parametrize(("name", "total"), [("llama", 1_235_814_400), ("qwen2", 494_032_768), ("qwen3", 596_049_920)])
def test_parameters_add_up_to_the_published_number(name: str, total: int) -> None:
    assert count_parameters(spec_from_config(REAL[name])) == total


@pytest.mark.parametrize("config", [*REAL.values(), {**QWEN25, "rope_scaling": YARN}])
def test_both_schemas_give_one_spec(config: Config) -> None:
    assert spec_from_config(new_schema(config)) == spec_from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        *REAL.values(),
        {**LLAMA32, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {**LLAMA32, "rope_scaling": {"type": "linear", "factor": 2}, "pad_token_id": 7, "eos_token_id": None},
        {**QWEN25, "rope_scaling": YARN},
        {**QWEN3, "attention_bias": True},
        {**QWEN3, "rope_scaling": {**YARN, "truncate": False, "attention_factor": 0.9, "beta_fast": 16}},
        {**QWEN3, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ],
)
def test_written_config_is_read_back_to_the_same_spec(config: Config) -> None:
    spec = spec_from_config(config)
    written = config_from_spec(spec, "bfloat16")
    assert spec_from_config(written) == spec
    old = {name: value for name, value in written.items() if name not in ("rope_parameters", "dtype")}
    new = {name: value for name, value in written.items() if name not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert spec_from_config(old) == spec_from_config(new) == spec
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", REAL)
def test_transformers_reads_the_written_config_to_the_same_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoConfig.for_model(**config_from_spec(spec_from_config(REAL[name]), "float32"))
    original = transformers.AutoConfig.for_model(**REAL[name])
    for field in (
        "hidden_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    ):
        assert getattr(read, field) == getattr(original, field)
    assert read.rope_parameters == original.rope_parameters
    assert read.eos_token_id == original.eos_token_id


def test_spec_is_hashable_and_equal_by_value() -> None:
    assert hash(spec_from_config(LLAMA32)) == hash(spec_from_config(copy.deepcopy(LLAMA32)))
    assert spec_from_config(LLAMA32) != dataclasses.replace(spec_from_config(LLAMA32), num_layers=15)


def test_what_a_config_leaves_out_is_derived() -> None:
    left_out = ("head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "hidden_act", "tie_word_embeddings")
    spec = spec_from_config({name: value for name, value in LLAMA32.items() if name not in left_out})
    assert (spec.head_dim, spec.num_kv_heads, spec.rope.theta, spec.tie_word_embeddings) == (64, 32, 1e4, False)


def test_yarn_factor_follows_from_the_two_lengths_unless_it_is_given() -> None:
    config = {**QWEN25, "max_position_embeddings": 131072}
    implied = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32768}
    assert spec_from_config({**config, "rope_scaling": implied}).rope.factor == 4.0
    assert spec_from_config({**config, "rope_scaling": {**implied, "factor": 3.0}}).rope.factor == 3.0


def test_a_yarn_truncate_of_null_is_false_as_transformers_reads_it() -> None:
    read = [
        spec_from_config({**QWEN25, "rope_scaling": {**YARN, **more}}).rope.truncate
        for more in ({}, {"truncate": None}, {"truncate": True})
    ]
    assert read == [True, False, True]


def test_two_original_lengths_that_differ_are_refused() -> None:
    name = "original_max_position_embeddings"
    assert spec_from_config({**QWEN25, name: 32768, "rope_scaling": YARN}).rope.original_max_position == 32768
    with pytest.raises(InputError, match=f"{name} is 4096, and 32768 inside the rope parameters"):
        spec_from_config({**QWEN25, name: 4096, "rope_scaling": YARN})


def test_a_yarn_mscale_of_zero_is_none() -> None:
    zero = {**YARN, "mscale": 1.0, "mscale_all_dim": 0}
    rope = spec_from_config({**QWEN25, "rope_scaling": zero}).rope
    assert (rope.mscale, rope.mscale_all_dim) == (1.0, None)
    assert yarn_attention_factor(rope) == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_attention_factor_is_given_or_follows_from_the_factor() -> None:
    yarn = RopeSpec("yarn", 1e6, 4.0, 32768)
    assert yarn_attention_factor(yarn) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(dataclasses.replace(yarn, attention_factor=0.5)) == 0.5
    assert yarn_attention_factor(dataclasses.replace(yarn, factor=1.0)) == 1.0
    both = dataclasses.replace(yarn, mscale=2.0, mscale_all_dim=0.5)
    assert yarn_attention_factor(both) == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


REFUSED: list[tuple[Config, str]] = [
    ({"model_type": "mistral"}, "model_type 'mistral'"),
    ({"model_type": None}, "model_type None"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"pretraining_tp": 2}, "pretraining_tp"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"hidden_size": "2048"}, "hidden_size"),
    ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
    ({"hidden_size": 2050, "head_dim": None}, "hidden_size 2050"),
    ({"head_dim": 63}, "head_dim 63"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number above 0, found 0"),
    ({"rope_scaling": {"type": "linear", "factor": None}}, "needs factor"),
    ({"rope_scaling": "linear"}, "one object for all layers, found 'linear'"),
    ({"rope_scaling": {"full_attention": {"rope_theta": 1e6}}}, "several kinds of rope"),
    ({"rope_theta": float("nan")}, "rope_theta must be a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
    ({"rms_norm_eps": "1e-5"}, "found '1e-5'"),
    ({"max_position_embeddings": "64"}, "max_position_embeddings must be a positive integer"),
    ({"num_key_value_heads": -2}, "num_key_value_heads must be a positive integer"),
    ({"bos_token_id": [1]}, "bos_token_id must be an integer or null"),
    ({"pad_token_id": True}, "pad_token_id must be an integer or null, found True"),
    ({"eos_token_id": "2"}, "eos_token_id must be an integer, a list of integers or null, found '2'"),
    ({"eos_token_id": [2, None]}, "eos_token_id must be an integer, a list of integers or null"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, found True"),
    ({"layer_types": True}, "layer_types must be a list or null, found True"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true, false or null, found 'false'"),
    ({"attention_bias": "no"}, "attention_bias must be true, false or null"),
    ({"rope_scaling": {**YARN, "beta_fast": "32"}}, "beta_fast must be a number above 0, found '32'"),
    ({"rope_scaling": {**YARN, "attention_factor": "x"}}, "attention_factor must be a number above 0, found 'x'"),
    ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate must be true, false or null, found 1"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_is_not_supported_is_refused_in_one_line(change: Config, named: str) -> None:
    with pytest.raises(InputError) as caught:
        spec_from_config({**LLAMA32, **change})
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def test_a_rope_scaling_stands_above_rope_parameters() -> None:
    """As in transformers, which lets the older key win where a config.json holds both."""
    config = {**config_from_spec(spec_from_config(QWEN25), "float32"), "rope_scaling": YARN}
    assert spec_from_config(config).rope == RopeSpec("yarn", 1e6, 4.0, 32768)


@pytest.mark.parametrize("name", REAL)
def test_random_weights_have_the_trees_shapes(name: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    spec = spec_from_config({**REAL[name], **sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    params = init_params(jax.random.key(0), spec, "bfloat16")
    assert jax.tree.map(lambda x: x.shape, params) == param_shapes(spec)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert set(LINEARS) <= set(params["layers"])
    assert len({float(abs(params["layers"][linear]).sum()) for linear in LINEARS}) == 7
