"""Calibration sums against a plain NumPy model that sees every sequence alone, without padding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.lora import Adapters
from efx_jax.model.decoder import LinearOptions, embed
from efx_jax.model.spec import LINEARS, ModelSpec
from efx_jax.model.stack import stack_layers
from efx_jax.pruning.blockwise import observe_block
from efx_jax.pruning.event import take_block
from efx_jax.pruning.statistics import INPUT_OF, INPUTS, Statistics, block_statistics, collect_statistics

Tree = dict[str, Any]


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """RoPE on `[T,heads,H]`: dimension j turns with j + H/2 by position * theta^(-2j/H)."""
    length, _, width = x.shape
    angle = np.arange(length)[:, None, None] * theta ** (-2 * np.arange(width // 2) / width)
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def silu_slope(x: np.ndarray) -> np.ndarray:
    """Derivative of silu by central differences."""
    return (silu(x + 1e-6) - silu(x - 1e-6)) / 2e-6


def masked_linears(params: Tree, adapters: Adapters | None, masks: Tree | None, layer: int) -> dict[str, np.ndarray]:
    """mask * (W + scale * B A) of one block, float64."""
    linears = {}
    for name in LINEARS:
        linears[name] = np.asarray(params["layers"][name][layer], np.float64)
        if adapters is not None:
            product = np.asarray(adapters.lora_b[name][layer], np.float64) @ np.asarray(adapters.lora_a[name][layer])
            linears[name] = linears[name] + adapters.scale * product
        if masks is not None:
            linears[name] = linears[name] * np.asarray(masks[name][layer])
    return linears


def activations(
    params: Tree, tokens: np.ndarray, spec: ModelSpec, adapters: Adapters | None, masks: Tree | None
) -> list[dict[str, np.ndarray]]:
    """What every block of the model computes on one sequence `[T]`, as `[T,units]`."""
    x = np.asarray(params["embed_tokens"], np.float64)[tokens]
    length, width, eps = len(tokens), spec.head_dim, spec.rms_norm_eps
    seen = []
    for index in range(spec.num_layers):
        own = {name: np.asarray(leaf[index], np.float64) for name, leaf in params["layers"].items()}
        weight = masked_linears(params, adapters, masks, index)
        attn_in = rms_norm(x, own["input_layernorm"], eps)
        q_raw, k_raw, v = (attn_in @ weight[name].T for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (y.reshape(length, -1, width) for y in (q_raw, k_raw, v))
        if spec.qk_norm:
            q, k = rms_norm(q, own["q_norm"], eps), rms_norm(k, own["k_norm"], eps)
        o_in = np.zeros((length, spec.num_heads, width))
        turned_q, turned_k = rotate(q, spec.rope.theta), rotate(k, spec.rope.theta)
        for head in range(spec.num_heads):
            served = head // (spec.num_heads // spec.num_kv_heads)
            for t in range(length):
                logits = turned_k[: t + 1, served] @ turned_q[t, head] / np.sqrt(width)
                share = np.exp(logits - logits.max())
                o_in[t, head] = share / share.sum() @ v[: t + 1, served]
        x = x + o_in.reshape(length, -1) @ weight["o_proj"].T
        mlp_in = rms_norm(x, own["post_attention_layernorm"], eps)
        gate, up = mlp_in @ weight["gate_proj"].T, mlp_in @ weight["up_proj"].T
        down_in = silu(gate) * up
        x = x + down_in @ weight["down_proj"].T
        units = {"attn_in": attn_in, "o_in": o_in, "mlp_in": mlp_in, "down_in": down_in, "q_raw": q_raw, "k_raw": k_raw}
        units |= {"q": q, "k": k, "gate_value": silu(gate), "gate_slope": up * silu_slope(gate)}
        seen.append({name: y.reshape(length, -1) for name, y in units.items()})
    return seen


def expected_sums(tiny: Any, masks: Tree | None) -> list[dict[str, np.ndarray]]:
    """All sequences' activations of every block, one below the other: `[all real tokens, units]`."""
    blocks: list[list[dict[str, np.ndarray]]] = [[] for _ in range(tiny.spec.num_layers)]
    for batch in tiny.batches:
        for row, length in zip(batch["tokens"], batch["lengths"], strict=True):
            seen = activations(tiny.params, row[:length], tiny.spec, tiny.adapters, masks)
            for block, units in zip(blocks, seen, strict=True):
                block.append(units)
    return [{name: np.concatenate([units[name] for units in block]) for name in block[0]} for block in blocks]


def draw_masks(tiny: Any) -> Tree:
    rng = np.random.default_rng(5)
    return {name: jnp.asarray(rng.random(tiny.params["layers"][name].shape) < 0.6) for name in LINEARS}


def collect(tiny: Any, batches: list[dict[str, np.ndarray]], gram: bool = True) -> Statistics:
    return collect_statistics(tiny.params, batches, tiny.spec, tiny.adapters, draw_masks(tiny), gram=gram)


@pytest.fixture(scope="module")
def masked_llama(llama: Any) -> Statistics:
    return collect(llama, llama.batches)


def assert_close(found: jax.Array, wanted: np.ndarray, name: str) -> None:
    """Within 2e-5 of the largest entry: float32 activations against float64."""
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_energies_and_grams_equal_a_plain_model(model: str, request: pytest.FixtureRequest) -> None:
    tiny = request.getfixturevalue(model)
    stats = request.getfixturevalue("masked_llama") if model == "llama" else collect(tiny, tiny.batches)
    for layer, units in enumerate(expected_sums(tiny, draw_masks(tiny))):
        assert set(stats.energy) == set(units)
        for name, values in units.items():
            assert_close(stats.energy[name][layer], (values**2).sum(0), f"energy {name}")
        for name in INPUTS:
            assert_close(stats.gram[name][layer], units[name].T @ units[name], f"gram {name}")
    real = sum(int(batch["lengths"].sum()) for batch in tiny.batches)
    np.testing.assert_array_equal(stats.tokens, [real] * tiny.spec.num_layers)


def test_garbage_in_the_padding_changes_no_bit(llama: Any, masked_llama: Statistics) -> None:
    rng = np.random.default_rng(9)
    dirty = []
    for batch in llama.batches:
        padding = np.arange(16)[None] >= batch["lengths"][:, None]
        assert padding.any()
        dirty.append({**batch, "tokens": np.where(padding, rng.integers(0, 31, (8, 16)), batch["tokens"])})
    for found, wanted in zip(jax.tree.leaves(collect(llama, dirty)), jax.tree.leaves(masked_llama), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_two_batches_are_one(llama: Any, masked_llama: Statistics) -> None:
    together = [{name: np.concatenate([b[name] for b in llama.batches]) for name in ("tokens", "lengths")}]
    for found, wanted in zip(jax.tree.leaves(collect(llama, together)), jax.tree.leaves(masked_llama), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_grams_are_of_inputs_as_the_linears_round_them() -> None:
    rng = np.random.default_rng(3)
    shapes = {"attn_in": 16, "o_in": 16, "mlp_in": 16, "down_in": 24, "gate": 24, "up": 24}
    taps = {name: jnp.asarray(rng.standard_normal((2, 4, units)), jnp.float32) for name, units in shapes.items()}
    taps |= {name: jnp.ones((2, 4, 2, 4)) for name in ("q_raw", "k_raw", "q", "k")}
    real = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0]], jnp.float32)
    found = block_statistics(taps, real, True, taps, "bfloat16")
    for name, gram in found.gram.items():
        rows = np.asarray(taps[name].astype(jnp.bfloat16), np.float64)[np.asarray(real) > 0]
        assert np.any(rows != np.asarray(taps[name])[np.asarray(real) > 0])
        np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.cross[name], gram, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_pass_in_bfloat16_sums_grams_of_rounded_inputs(llama: Any, by_block: bool) -> None:
    """Down's inputs are products of float32 numbers; the sums of their squares are taken before they are rounded."""
    if by_block:
        layer = take_block(stack_layers(llama.params, None, None), 0)
        x, real = embed(llama.params, llama.batches[0]["tokens"]), jnp.ones(llama.batches[0]["tokens"].shape)
        seen = observe_block(
            x, None, real, layer, llama.spec, LinearOptions(compute_dtype="bfloat16"), "xla", gram=True, moves_on=False
        )[2]
    else:
        seen = collect_statistics(llama.params, llama.batches, llama.spec, gram=True, compute_dtype="bfloat16")
    diagonal = jnp.diagonal(seen.gram["down_in"], axis1=-2, axis2=-1)
    apart = np.abs(np.asarray(diagonal / seen.energy["down_in"]) - 1)
    assert 1e-5 < apart.max() < 2**-7


def test_every_product_of_the_sums_asks_for_float32(masked_llama: Statistics) -> None:
    # On a GPU or TPU the default precision would round the operands to 10 or 8 bits.
    shapes = {"attn_in": 16, "o_in": 16, "mlp_in": 16, "down_in": 24, "gate": 24, "up": 24}
    taps = {name: jnp.zeros((2, 4, units)) for name, units in shapes.items()}
    taps |= {name: jnp.zeros((2, 4, 2, 4)) for name in ("q_raw", "k_raw", "q", "k")}
    program = jax.make_jaxpr(block_statistics, static_argnums=2)(taps, jnp.ones((2, 4)), True)
    products = [equation for equation in program.jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) >= len(masked_llama.gram)
    for product in products:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_the_diagonal_of_a_gram_is_the_energy(masked_llama: Statistics) -> None:
    for name in LINEARS:
        diagonal = jnp.diagonal(masked_llama.input_gram(name), axis1=-2, axis2=-1)
        np.testing.assert_allclose(diagonal, masked_llama.energy[INPUT_OF[name]], rtol=1e-5)
        np.testing.assert_allclose(jnp.sqrt(diagonal), masked_llama.input_norm(name), rtol=1e-5)


def test_without_lengths_every_token_is_real(llama: Any) -> None:
    full = {"tokens": llama.batches[0]["tokens"], "lengths": np.full(8, 16, np.int32)}
    with_lengths, without = collect(llama, [full]), collect(llama, [{"tokens": full["tokens"]}])
    np.testing.assert_array_equal(without.energy["down_in"], with_lengths.energy["down_in"])
    assert float(without.tokens[0]) == 8 * 16


def test_no_batch_and_no_real_token_are_refused_with_one_line(llama: Any) -> None:
    empty = {"tokens": llama.batches[0]["tokens"], "lengths": np.zeros(8, np.int32)}
    for batches in ([], [empty]):
        with pytest.raises(InputError, match="expected at least one real token, found none") as caught:
            collect(llama, batches)
        assert "\n" not in str(caught.value)


def test_a_missing_gram_is_refused_with_one_line(masked_llama: Statistics) -> None:
    with pytest.raises(InputError, match="collect with gram=True"):
        dataclasses.replace(masked_llama, gram={}).input_gram("q_proj")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_mask": np.ones((8, 16), np.int32)}, "found tokens, lengths, attention_mask; .*attention_mask.sum"),
        ({"lengths": np.full((8, 1), 16, np.int32)}, r"calibration: lengths: expected shape \[8\], found \[8, 1\]"),
        ({"lengths": np.full(8, 17, np.int32)}, "expected lengths from 0 to 16, found 17 to 17"),
        ({"tokens": np.full((8, 16), 31, np.int32)}, "expected tokens from 0 to 30, found 31 to 31"),
        ({"tokens": np.full((8, 16), -1, np.int32)}, "expected tokens from 0 to 30, found -1 to -1"),
        ({"tokens": np.zeros(16, np.int32)}, r"expected integer tokens \[B,T\], found int32 \[16\]"),
        ({"tokens": np.zeros((8, 16), np.float32)}, r"expected integer tokens \[B,T\], found float32 \[8, 16\]"),
    ],
)
def test_a_batch_that_would_be_misread_is_refused_with_one_line(llama: Any, change: Tree, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        collect(llama, [{**llama.batches[0], **change}])
    assert "\n" not in str(caught.value)
