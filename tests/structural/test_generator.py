"""The decision network against NumPy and, where it is installed, torch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.structural.generator import (
    Generator,
    draw_hard,
    draw_soft,
    encode,
    gumbel_sigmoid,
    init_generator,
    orthogonal,
    straight_through,
    unit_logits,
)
from efx_jax.structural.units import units_of

new_generator = jax.jit(init_generator, static_argnames=("spec", "space"))


@pytest.fixture(scope="module")
def generator(make_tiny: Callable) -> Generator:
    """A network whose norms and biases are not the trivial ones."""
    fresh = new_generator(jax.random.key(0), make_tiny("llama").spec, "paper")
    leaves, structure = jax.tree.flatten(fresh.weights)
    rng = np.random.default_rng(6)
    moved = [jnp.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return fresh.replace(weights=jax.tree.unflatten(structure, moved))


def _norm(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * weights["gain"] + weights["bias"]


def _encode(encoder: Any, x: np.ndarray) -> np.ndarray:
    for index in range(2):
        layer = jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index], np.float64), encoder)
        projected = x @ layer["in_proj"]["weight"].T + layer["in_proj"]["bias"]
        heads = []
        for head in range(4):
            q, k, v = (projected[:, part * 64 + head * 16 : part * 64 + head * 16 + 16] for part in range(3))
            weights = np.exp(q @ k.T / 4)
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        mixed = np.concatenate(heads, 1) @ layer["out_proj"]["weight"].T + layer["out_proj"]["bias"]
        x = _norm(x + mixed, layer["norm1"])
        inner = np.maximum(x @ layer["linear1"]["weight"].T + layer["linear1"]["bias"], 0)
        x = _norm(x + inner @ layer["linear2"]["weight"].T + layer["linear2"]["bias"], layer["norm2"])
    return x


def test_logits_are_those_of_numpy(generator: Generator) -> None:
    states = _encode(generator.weights["encoder"], np.asarray(generator.embeddings, np.float64))
    states = _norm(states, generator.weights["norm"])
    for kind, logits in unit_logits(generator).items():
        matrix = np.asarray(generator.weights["units"][kind], np.float64)
        expected = np.stack([matrix[layer] @ states[layer] for layer in range(len(states))])
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_encoder_is_the_one_of_torch(generator: Generator) -> None:
    torch = pytest.importorskip("torch")
    block = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=256, batch_first=True)
    network = torch.nn.TransformerEncoder(block, num_layers=2).eval()
    names = {
        "self_attn.in_proj_": "in_proj",
        "self_attn.out_proj.": "out_proj",
        "linear1.": "linear1",
        "linear2.": "linear2",
        "norm1.": "norm1",
        "norm2.": "norm2",
    }
    tensors = {}
    for index in range(2):
        for theirs, ours in names.items():
            leaves = generator.weights["encoder"][ours]
            weight = leaves["gain"] if "norm" in ours else leaves["weight"]
            tensors[f"layers.{index}.{theirs}weight"] = torch.tensor(np.array(weight[index]))
            tensors[f"layers.{index}.{theirs}bias"] = torch.tensor(np.array(leaves["bias"][index]))
    network.load_state_dict(tensors)
    with torch.no_grad():
        expected = network(torch.tensor(np.array(generator.embeddings))).numpy()
    np.testing.assert_allclose(encode(generator.weights["encoder"], generator.embeddings), expected, atol=2e-5)


def test_masks_follow_the_gumbel_sigmoid() -> None:
    logits, noise = np.array([-3.2, -3.0, 0.5, 2.0]), np.array([0.1, 0.0, -4.0, 0.3])
    expected = 1 / (1 + np.exp(-(logits + noise + 3.0) / 0.4))
    soft = gumbel_sigmoid(jnp.asarray(logits), jnp.asarray(noise))
    np.testing.assert_allclose(soft, expected, rtol=1e-5)
    np.testing.assert_array_equal(straight_through(soft), [0.0, 1.0, 0.0, 1.0])


def test_hard_masks_pass_the_gradient_straight_through() -> None:
    soft = jnp.linspace(0.0, 1.0, 101)
    assert set(np.unique(straight_through(soft))) == {0.0, 1.0}
    np.testing.assert_array_equal(jax.grad(lambda y: jnp.sum(3 * straight_through(y)))(soft), np.full(101, 3.0))


def test_noise_is_gumbel_and_new_with_every_key(generator: Generator) -> None:
    logits = unit_logits(generator)

    @jax.jit
    def noise(seed: int) -> jax.Array:
        soft = draw_soft(generator, jax.random.key(seed))
        drawn = {kind: 0.4 * jax.scipy.special.logit(jnp.clip(y, 1e-6, 1 - 1e-6)) - 3.0 for kind, y in soft.items()}
        return jnp.concatenate([jnp.ravel(drawn[kind] - logits[kind]) for kind in logits])

    assert not np.allclose(noise(0), noise(1))
    np.testing.assert_array_equal(noise(2), noise(2))
    # Low noise is what prunes, and there the sigmoid is not yet flat: P(G < 0) = exp(-1).
    share = np.mean(np.concatenate([noise(seed) for seed in range(40)]) < 0)
    np.testing.assert_allclose(share, np.exp(-1), atol=0.03)


def test_hard_masks_are_the_rounded_soft_ones(generator: Generator) -> None:
    key = jax.random.key(4)
    soft, hard = draw_soft(generator, key), draw_hard(generator, key)
    for kind, mask in hard.items():
        np.testing.assert_array_equal(mask, np.asarray(soft[kind]) >= 0.5)


@pytest.mark.parametrize("space", ["paper", "sliceable"])
def test_a_new_generator_keeps_every_unit(space: str, make_tiny: Callable) -> None:
    spec = make_tiny("llama").spec
    masks = draw_hard(new_generator(jax.random.key(1), spec, space), jax.random.key(2))
    assert {kind: mask.shape for kind, mask in masks.items()} == {
        kind: (spec.num_layers, units.count) for kind, units in units_of(spec, space).items()
    }
    assert all(bool(mask.all()) for mask in masks.values())


@pytest.mark.parametrize("layers", [3, 64, 80])
def test_embeddings_are_orthogonal(layers: int) -> None:
    matrix = np.asarray(orthogonal(jax.random.key(0), (layers, 64)), np.float64)
    assert matrix.shape == (layers, 64)
    product = matrix @ matrix.T if layers <= 64 else matrix.T @ matrix
    np.testing.assert_allclose(product, np.eye(len(product)), atol=1e-5)
