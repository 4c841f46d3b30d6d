"""The decoder against transformers: live where torch is installed, else against tests/golden/parity.npz."""

import functools
import os
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efx_jax
from efx_jax.model.decoder import forward, head_weight, hidden_states
from efx_jax.model.generate import generate
from efx_jax.model.layers import rope_frequencies
from efx_jax.model.spec import ModelSpec, config_from_spec, param_shapes, spec_from_config

GOLDEN = Path(__file__).parents[1] / "golden"
MAKER = runpy.run_path(str(GOLDEN / "make_parity.py"))
CASES, FAR = MAKER["CASES"], MAKER["FAR_CASES"]
NAMES = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
NAMES |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
NAMES |= {name: name for name in ("input_layernorm", "post_attention_layernorm")}
jitted_forward = jax.jit(forward, static_argnames=("spec", "compute_dtype"))


def hf_name(leaf: str, layer: int) -> str:
    stem = NAMES[leaf.removesuffix("_bias")]
    return f"model.layers.{layer}.{stem}.{'bias' if leaf.endswith('_bias') else 'weight'}"


def params_of(tensors: dict[str, np.ndarray], spec: ModelSpec, dtype: str = "float32") -> dict[str, Any]:
    shapes = param_shapes(spec)
    layers = {
        leaf: np.stack([tensors[hf_name(leaf, layer)] for layer in range(spec.num_layers)]) for leaf in shapes["layers"]
    }
    params = {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "layers": layers,
        "norm": tensors["model.norm.weight"],
    }
    if "lm_head" in shapes:
        params["lm_head"] = tensors["lm_head.weight"]
    assert jax.tree.map(np.shape, params) == shapes
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def tensors_of(params: dict[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
    tensors = {"model.embed_tokens.weight": params["embed_tokens"], "model.norm.weight": params["norm"]}
    for leaf, stacked in params["layers"].items():
        tensors |= {hf_name(leaf, layer): stacked[layer] for layer in range(spec.num_layers)}
    if "lm_head" in params:
        tensors["lm_head.weight"] = params["lm_head"]
    return {name: np.array(tensor) for name, tensor in tensors.items()}


@functools.partial(jax.jit, static_argnames="spec")
def logits_at(params: dict[str, Any], tokens: jax.Array, positions: jax.Array, spec: ModelSpec) -> jax.Array:
    return hidden_states(params, tokens, spec, positions=positions) @ head_weight(params).T


@functools.cache
def ours(case: str) -> np.ndarray:
    spec = spec_from_config(CASES[case])
    params, tokens = params_of(MAKER["tensors"](CASES[case]), spec), MAKER["tokens"](case)
    if case in FAR:
        return np.asarray(logits_at(params, tokens, MAKER["positions"](case), spec))
    return np.asarray(jitted_forward(params, tokens, spec))


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "parity.npz") as arrays:
        return dict(arrays)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """2e-5 of the largest logit, beyond position 8,192 too, where the rounding of an angle alone is 5e-4 rad."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_golden_ones_of_transformers(case: str) -> None:
    assert_close(ours(case)[:, MAKER["STORED"]], golden()[f"{case}.logits"])


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = MAKER["transformers_model"](CASES[case], MAKER["tensors"](CASES[case]))
    expected = MAKER["transformers_logits"](model, MAKER["tokens"](case), MAKER["positions"](case))
    assert_close(ours(case), expected)


@pytest.mark.parametrize("case", CASES)
def test_rope_frequencies_equal_transformers_to_the_bit(case: str) -> None:
    spec = spec_from_config(CASES[case])
    frequencies, factor = rope_frequencies(spec.rope, spec.head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies, golden()[f"{case}.inv_freq"])
    assert factor == golden()[f"{case}.attention_factor"]


def test_every_yarn_option_changes_the_golden_logits() -> None:
    for other in ("yarn_attention_factor", "yarn_mscale", "yarn_not_truncated"):
        difference = np.abs(golden()[f"{other}.logits"] - golden()["yarn.logits"]).max()
        assert difference > 2e-3 * np.abs(golden()["yarn.logits"]).max()


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_padding_on_the_right_changes_no_real_token(case: str) -> None:
    spec = spec_from_config(CASES[case])
    params, tokens = params_of(MAKER["tensors"](CASES[case]), spec), MAKER["tokens"](case)
    tokens = np.where(np.arange(tokens.shape[1]) < 11, tokens, 0)
    padded = np.asarray(jitted_forward(params, tokens, spec))[:, :11]
    np.testing.assert_allclose(padded, ours(case)[:, :11], atol=1e-5 * np.abs(padded).max())
    alone = np.asarray(jitted_forward(params, tokens[1:, :11], spec))
    np.testing.assert_allclose(padded[1:], alone, atol=1e-5 * np.abs(padded).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_half_precision_stays_within_a_few_roundings_of_float32(case: str, dtype: str) -> None:
    """Weights, operands and residual stream are rounded; the error is the root mean square over that of the logits."""
    spec = spec_from_config(CASES[case])
    params = params_of(MAKER["tensors"](CASES[case]), spec, dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    tokens = MAKER["tokens"](case)
    exact = np.asarray(jitted_forward(wide, tokens, spec))
    rounded = np.asarray(jitted_forward(params, tokens, spec))
    assert rounded.dtype == np.float32
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert error < 3 * float(jnp.finfo(dtype).eps)


@pytest.fixture(scope="module")
def smollm2() -> tuple[dict[str, Any], ModelSpec, Any]:
    """Real weights, and transformers' model of them."""
    if "EFX_SMOLLM2_GGUF" not in os.environ:
        pytest.skip("EFX_SMOLLM2_GGUF names no file")
    pytest.importorskip("torch")
    params, spec = efx_jax.load_pretrained(os.environ["EFX_SMOLLM2_GGUF"])
    return params, spec, MAKER["transformers_model"](config_from_spec(spec, "float32"), tensors_of(params, spec))


def test_smollm2_logits_equal_transformers(smollm2: Any) -> None:
    params, spec, model = smollm2
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 48), np.int32)
    expected = MAKER["transformers_logits"](model, tokens, np.tile(np.arange(48), (2, 1)))
    assert_close(np.asarray(jitted_forward(params, tokens, spec)), expected)


def test_smollm2_writes_what_transformers_writes(smollm2: Any) -> None:
    import torch

    params, spec, model = smollm2
    tokenizer = efx_jax.load_tokenizer(os.environ["EFX_SMOLLM2_GGUF"])
    texts = ["The capital of France is", "Aspirin is used to treat", "A judge"]
    prompts = [tokenizer(text).input_ids for text in texts]
    lengths = np.asarray([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    found = np.asarray(generate(params, tokens, lengths, spec, 8, stop_tokens=spec.eos_token_ids))
    for row, prompt in enumerate(prompts):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        new = expected[0, len(prompt) :].tolist()
        assert found[row].tolist() == new + [-1] * (8 - len(new))
