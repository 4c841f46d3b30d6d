"""The energy of the gradients by the linears' outputs, against jax.grad by biases and by the residual stream."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.lora import init_lora
from efx_jax.model.decoder import LinearOptions, attend_within, block, embed, forward
from efx_jax.model.layers import rope_tables
from efx_jax.model.spec import LINEARS, init_params
from efx_jax.model.stack import Layer
from efx_jax.pruning.output_gradient import output_gradient_energy
from efx_jax.pruning.statistics import collect_statistics
from tests.tiny import LLAMA

SPEC = dataclasses.replace(LLAMA, vocab_size=31, rms_norm_eps=1e-5)
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def params() -> Tree:
    return jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else 2 * leaf, init_params(jax.random.key(0), SPEC))


def test_the_energy_of_output_gradients_is_that_of_every_token(params: Tree) -> None:
    """With two tokens a row only the first reaches the loss: the gradient by an output is that by a bias there."""
    rng = np.random.default_rng(5)
    fresh = init_lora(jax.random.key(1), params, SPEC, 3)
    lora_b = {name: jnp.asarray(0.1 * rng.standard_normal(b.shape), jnp.float32) for name, b in fresh.lora_b.items()}
    adapters = dataclasses.replace(fresh, lora_b=lora_b)
    masks = {name: jnp.asarray(rng.random(params["layers"][name].shape) < 0.5) for name in LINEARS}
    pairs = np.random.default_rng(8).integers(0, 31, (5, 2)).astype(np.int32)
    biases = {f"{name}_bias": jnp.zeros(params["layers"][name].shape[:2]) for name in LINEARS}

    @jax.jit
    def by_bias(biases: Tree, pair: jax.Array) -> Tree:
        def loss(biases: Tree) -> jax.Array:
            biased = {**params, "layers": params["layers"] | biases}
            logits = forward(biased, pair[None], SPEC, adapters, masks)
            return -jax.nn.log_softmax(logits[0, 0])[pair[1]]

        return jax.grad(loss)(biases)

    expected = {name: np.zeros(params["layers"][name].shape[:2]) for name in LINEARS}
    for pair in pairs:
        for name, gradient in by_bias(biases, jnp.asarray(pair)).items():
            expected[name.removesuffix("_bias")] += np.square(np.asarray(gradient, np.float64))
    batches = [
        {"tokens": pairs[:3], "lengths": np.full(3, 2)},
        # Padding predicts nothing, and a row of one token neither.
        {"tokens": np.pad(pairs[2:], ((0, 0), (0, 3)), constant_values=7), "lengths": np.array([1, 2, 2])},
    ]
    found, _ = output_gradient_energy(params, batches, SPEC, adapters, masks)
    assert set(found) == set(LINEARS)
    for name, energy in found.items():
        # A query with one key has no choice.
        assert np.any(expected[name]) == (name not in ("q_proj", "k_proj"))
        np.testing.assert_allclose(energy, expected[name], rtol=2e-5, atol=1e-7 * np.max(expected[name]))


def test_the_energy_adds_up_over_the_tokens_of_a_row(params: Tree) -> None:
    """The last matrix writes into the stream that only the head reads: its gradient is that by the stream."""
    tokens = np.random.default_rng(9).integers(0, 31, (2, 9)).astype(np.int32)
    layers = params["layers"]

    @jax.jit
    def by_stream(shift: jax.Array) -> jax.Array:
        def loss(shift: jax.Array) -> jax.Array:
            hidden = _stream(params, tokens) + shift
            scale = jax.lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + SPEC.rms_norm_eps)
            log_probs = jax.nn.log_softmax((hidden * scale * params["norm"]) @ params["embed_tokens"].T)
            return -jnp.sum(jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1))

        return jax.grad(loss)(shift)

    expected = np.sum(np.square(by_stream(jnp.zeros((2, 9, SPEC.hidden_size)))), axis=(0, 1))
    batches = [{"tokens": tokens, "lengths": np.full(2, 9)}]
    found, _ = output_gradient_energy(params, batches, SPEC, names=("down_proj",), remat="none")
    assert found["down_proj"].shape == layers["down_proj"].shape[:2]
    np.testing.assert_allclose(found["down_proj"][-1], expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_with_drawn_tokens_the_energy_is_the_fisher_information(params: Tree) -> None:
    """The first of two tokens, in 2,048 rows: on average sum_v p_v (d log p_v / d y_o)^2, whatever the second is."""
    first, names = 5, ("v_proj", "gate_proj", "down_proj")
    biases = {f"{name}_bias": jnp.zeros(params["layers"][name].shape[:2]) for name in names}

    @jax.jit
    def log_probs(biases: Tree) -> jax.Array:
        biased = {**params, "layers": params["layers"] | biases}
        return jax.nn.log_softmax(forward(biased, jnp.asarray([[first]]), SPEC)[0, 0])

    gradients, probs = jax.jacrev(log_probs)(biases), np.exp(np.asarray(log_probs(biases), np.float64))
    rows = 2048
    batches = [{"tokens": np.stack([np.full(rows, first), np.full(rows, last)], 1).astype(np.int32)} for last in (3, 7)]
    found = [output_gradient_energy(params, [batch], SPEC, names=names, key=jax.random.key(2))[0] for batch in batches]
    for name in names:
        squares = np.square(np.asarray(gradients[f"{name}_bias"], np.float64))
        expected = np.einsum("v,vlo->lo", probs, squares)
        spread = np.sqrt((np.einsum("v,vlo->lo", probs, squares**2) - expected**2) / rows)
        assert np.all(np.abs(found[0][name] / rows - expected) < 4.5 * spread + 1e-9)
        assert np.all(spread < 0.2 * expected)
        np.testing.assert_array_equal(found[0][name], found[1][name])
    both, _ = output_gradient_energy(params, batches, SPEC, names=names, key=jax.random.key(2))
    # The second batch draws others.
    assert np.all(np.asarray(both["v_proj"]) != 2 * np.asarray(found[0]["v_proj"]))


def test_what_is_drawn_does_not_depend_on_how_rows_are_batched(params: Tree) -> None:
    tokens = np.random.default_rng(4).integers(0, 31, (3, 6)).astype(np.int32)
    lengths = np.array([6, 5, 3])
    # What a batch lacks is filled with rows of no token, and a row may be padded to any length.
    split = [
        {"tokens": tokens[:2], "lengths": lengths[:2]},
        {"tokens": np.pad(tokens[2:], ((0, 1), (0, 3))), "lengths": np.array([3, 0])},
    ]
    key = jax.random.key(6)
    whole, _ = output_gradient_energy(
        params, [{"tokens": tokens, "lengths": lengths}], SPEC, names=("v_proj",), key=key
    )
    parts, _ = output_gradient_energy(params, split, SPEC, names=("v_proj",), key=key)
    np.testing.assert_allclose(parts["v_proj"], whole["v_proj"], rtol=1e-4)
    other, _ = output_gradient_energy(params, split, SPEC, names=("v_proj",), key=jax.random.key(7))
    assert not np.allclose(parts["v_proj"], other["v_proj"], rtol=0.01)


@pytest.mark.parametrize("remat", ["none", "linears", "block"])
def test_the_forward_pass_leaves_the_statistics_of_its_rows(params: Tree, remat: Any) -> None:
    tokens = np.random.default_rng(4).integers(0, 31, (3, 6)).astype(np.int32)
    batches = [{"tokens": tokens[:2], "lengths": np.array([6, 4])}, {"tokens": tokens[1:], "lengths": np.array([3, 0])}]
    _, found = output_gradient_energy(params, batches, SPEC, key=jax.random.key(6), remat=remat)
    expected = collect_statistics(params, batches, SPEC)
    assert found.energy.keys() == expected.energy.keys() and not found.gram
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def _stream(params: Tree, tokens: np.ndarray) -> jax.Array:
    """The residual stream `[B,T,D]` behind the last block."""
    x = embed(params, jnp.asarray(tokens))
    rope = rope_tables(SPEC.rope, SPEC.head_dim, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    for index in range(SPEC.num_layers):
        layer = Layer({name: leaf[index] for name, leaf in params["layers"].items()}, {}, {}, {})
        x, _, _ = block(x, layer, SPEC, LinearOptions(), rope, attend_within())
    return x
