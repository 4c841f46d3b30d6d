"""ATP's pruning-decision generator: fixed embeddings of the layers -> which units each keeps (arXiv 2412.14426).

The network is that of the authors' second version: a Transformer encoder over the layers of the model and a bias-free
linear for every layer and kind of unit (the first version had a bidirectional GRU). Its dropout is left out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.einsum import einsum
from efx_jax.model.spec import ModelSpec
from efx_jax.structural.units import Space, units_of

Array = jax.Array
Weights = dict[str, Any]
WIDTH, HEADS, FEED_FORWARD, ENCODER_LAYERS = 64, 4, 256, 2
OFFSET, TEMPERATURE = 3.0, 0.4
_EPS = 1e-5


@struct.dataclass
class Generator:
    """The decision network: `embeddings [L,64]` never change, `weights` are trained.

    `weights["encoder"]` holds arrays stacked over the encoder's two layers, `weights["norm"]` gain and bias, and
    `weights["units"][kind]` the projections `[L,n,64]`.
    """

    embeddings: Array
    weights: Weights


def init_generator(key: Array, spec: ModelSpec, space: Space) -> Generator:
    """A new network, float32, initialised as torch initialises its layers: at first every unit is kept.

    Args:
        key: PRNG key.
        spec: the model; its numbers of layers and units determine the shapes.
        space: which units.
    """
    embedding_key, encoder_key, units_key = jax.random.split(key, 3)
    units = {
        kind: _uniform(jax.random.fold_in(units_key, index), (spec.num_layers, each.count, WIDTH), WIDTH**-0.5)
        for index, (kind, each) in enumerate(units_of(spec, space).items())
    }
    weights = {"encoder": _init_encoder(encoder_key), "norm": _init_norm((WIDTH,)), "units": units}
    return Generator(embeddings=orthogonal(embedding_key, (spec.num_layers, WIDTH)), weights=weights)


def orthogonal(key: Array, shape: tuple[int, int]) -> Array:
    """A random matrix with orthonormal rows, or orthonormal columns if it has fewer columns than rows; float32."""
    tall = (max(shape), min(shape))
    basis, upper = jnp.linalg.qr(jax.random.normal(key, tall, jnp.float32))
    # Without the signs of the triangle's diagonal, the factor is not uniform over orthogonal matrices.
    basis = basis * jnp.sign(jnp.diagonal(upper))
    return basis if shape == tall else basis.T


def unit_logits(generator: Generator) -> dict[str, Array]:
    """Each unit's logit for being kept, without noise or offset: kind -> `[L,n]`, float32."""
    weights = generator.weights
    states = encode(weights["encoder"], generator.embeddings)
    states = layer_norm(states, **weights["norm"])
    return {kind: einsum("ld,lnd->ln", states, matrix) for kind, matrix in weights["units"].items()}


def encode(encoder: Mapping[str, Mapping[str, Array]], states: Array) -> Array:
    """A Transformer encoder like torch's `TransformerEncoder` with its defaults (post-norm, ReLU), `[L,64]`."""

    def layer(states: Array, weights: Mapping[str, Mapping[str, Array]]) -> tuple[Array, None]:
        states = layer_norm(states + _attention(weights, states), **weights["norm1"])
        inner = jax.nn.relu(_linear(weights["linear1"], states))
        return layer_norm(states + _linear(weights["linear2"], inner), **weights["norm2"]), None

    return jax.lax.scan(layer, states, encoder)[0]


def layer_norm(x: Array, gain: Array, bias: Array) -> Array:
    """(x - mean) / sqrt(var + 1e-5) * gain + bias over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + _EPS) * gain + bias


def gumbel_sigmoid(logits: Array, noise: Array) -> Array:
    """Soft masks y = sigmoid((logit + gumbel + 3.0) / 0.4), any shape."""
    return jax.nn.sigmoid((logits + noise + OFFSET) / TEMPERATURE)


def straight_through(soft: Array) -> Array:
    """Hard masks y >= 0.5 as float32 0 and 1, whose gradient is that of the soft ones."""
    hard = (soft >= 0.5).astype(soft.dtype)
    return soft + jax.lax.stop_gradient(hard - soft)


def draw_soft(generator: Generator, key: Array) -> dict[str, Array]:
    """Soft masks of all units with fresh noise: kind -> float32 `[L,n]`; differentiable in the weights."""
    return {
        kind: gumbel_sigmoid(logits, jax.random.gumbel(jax.random.fold_in(key, index), logits.shape))
        for index, (kind, logits) in enumerate(sorted(unit_logits(generator).items()))
    }


def draw_hard(generator: Generator, key: Array) -> dict[str, Array]:
    """Masks of all units with fresh noise: kind -> bool `[L,n]`."""
    return {kind: soft >= 0.5 for kind, soft in draw_soft(generator, key).items()}


def _attention(weights: Mapping[str, Mapping[str, Array]], states: Array) -> Array:
    length = states.shape[0]
    query, key, value = jnp.split(_linear(weights["in_proj"], states), 3, axis=-1)
    query, key, value = (part.reshape(length, HEADS, -1) for part in (query, key, value))
    scores = einsum("qhd,khd->hqk", query, key) / (WIDTH // HEADS) ** 0.5
    context = einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), value)
    return _linear(weights["out_proj"], context.reshape(length, WIDTH))


def _linear(layer: Mapping[str, Array], x: Array) -> Array:
    return einsum("...i,oi->...o", x, layer["weight"]) + layer["bias"]


def _init_encoder(key: Array) -> Weights:
    """torch's initialisation: Xavier for the attention's input, its biases 0; all else uniform within 1/sqrt(I)."""
    keys = jax.random.split(key, 6)
    layers, inner = ENCODER_LAYERS, FEED_FORWARD
    xavier = (6 / (4 * WIDTH)) ** 0.5
    return {
        "in_proj": {
            "weight": _uniform(keys[0], (layers, 3 * WIDTH, WIDTH), xavier),
            "bias": jnp.zeros((layers, 3 * WIDTH)),
        },
        "out_proj": {
            "weight": _uniform(keys[1], (layers, WIDTH, WIDTH), WIDTH**-0.5),
            "bias": jnp.zeros((layers, WIDTH)),
        },
        "linear1": {
            "weight": _uniform(keys[2], (layers, inner, WIDTH), WIDTH**-0.5),
            "bias": _uniform(keys[3], (layers, inner), WIDTH**-0.5),
        },
        "linear2": {
            "weight": _uniform(keys[4], (layers, WIDTH, inner), inner**-0.5),
            "bias": _uniform(keys[5], (layers, WIDTH), inner**-0.5),
        },
        "norm1": _init_norm((layers, WIDTH)),
        "norm2": _init_norm((layers, WIDTH)),
    }


def _init_norm(shape: tuple[int, ...]) -> dict[str, Array]:
    return {"gain": jnp.ones(shape), "bias": jnp.zeros(shape)}


def _uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
