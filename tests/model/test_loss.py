"""The chunked loss equals optax's on the positions that carry weight, and reads no others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efx_jax.config import MeshConfig
from efx_jax.model.loss import cross_entropy, drawn_cross_entropy
from efx_jax.parallel.mesh import make_mesh

V, D = 37, 8
Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def draw(rows: int, length: int, share: float) -> Arrays:
    """Hidden states `[B,T,D]`, head `[V,D]`, targets `[B,T]`, and weights of which a share is not 0."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((rows, length, D)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (rows, length)), jnp.int32)
    weights = rng.uniform(0.5, 2.0, (rows, length)) * (rng.uniform(size=(rows, length)) < share)
    return hidden, head, targets, jnp.asarray(weights, jnp.float32)


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = jnp.einsum("btd,vd->btv", hidden, head, precision="highest")
    log_probs = jax.nn.log_softmax(logits)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * nll), jnp.sum(weights * -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))


# 2 x 5 is less than a chunk of 512 tokens, 4 x 128 exactly one, 3 x 401 is no multiple of it.
@pytest.mark.parametrize(("rows", "length", "share"), [(2, 5, 0.5), (4, 128, 1.0), (3, 401, 0.3), (3, 401, 1.0)])
def test_loss_entropy_and_gradient_equal_optax(rows: int, length: int, share: float) -> None:
    arrays = draw(rows, length, share)
    (nll, entropy), gradient = jax.value_and_grad(cross_entropy, has_aux=True)(*arrays)
    (plain_nll, plain_entropy), plain_gradient = jax.value_and_grad(plain, has_aux=True)(*arrays)
    np.testing.assert_allclose(nll, plain_nll, rtol=1e-5)
    np.testing.assert_allclose(entropy, plain_entropy, rtol=1e-5)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-5, atol=1e-5)
    assert (nll.dtype, entropy.dtype, gradient.dtype) == (jnp.float32,) * 3


def test_the_gradient_scales_with_what_follows_the_loss() -> None:
    arrays = draw(2, 5, 0.5)
    single = jax.grad(lambda hidden: cross_entropy(hidden, *arrays[1:])[0])(arrays[0])
    halved = jax.grad(lambda hidden: 0.5 * cross_entropy(hidden, *arrays[1:])[0])(arrays[0])
    np.testing.assert_allclose(halved, 0.5 * single, rtol=1e-6)


@pytest.mark.parametrize("target", [-100, V + 5])
def test_what_has_no_weight_is_not_read(target: int) -> None:
    hidden, head, targets, weights = draw(3, 401, 0.3)
    expected, expected_gradient = jax.value_and_grad(cross_entropy, has_aux=True)(hidden, head, targets, weights)
    skipped = weights == 0
    garbled = jnp.where(skipped[..., None], jnp.nan, hidden)
    found, gradient = jax.value_and_grad(cross_entropy, has_aux=True)(
        garbled, head, jnp.where(skipped, target, targets), weights
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert not np.asarray(gradient)[np.asarray(skipped)].any()


def test_without_any_weight_loss_and_gradient_are_zero() -> None:
    hidden, head, targets, weights = draw(2, 5, 0.0)
    (nll, entropy), gradient = jax.value_and_grad(cross_entropy, has_aux=True)(hidden, head, targets, weights)
    assert (float(nll), float(entropy)) == (0, 0)
    assert not np.asarray(gradient).any()


def test_the_head_gets_no_gradient() -> None:
    hidden, head, targets, weights = draw(2, 5, 1.0)
    assert not np.asarray(jax.grad(lambda h: cross_entropy(hidden, h, targets, weights)[0])(head)).any()


def test_bfloat16_operands_keep_float32_sums() -> None:
    hidden, head, targets, weights = draw(3, 401, 1.0)
    nll, entropy = cross_entropy(hidden, head, targets, weights, "bfloat16")
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
    exact = plain(*rounded, targets, weights)
    np.testing.assert_allclose((nll, entropy), exact, rtol=1e-5)


def draw_fractions(hidden: np.ndarray, head: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """Fractions `[B,T]`, none within float32's rounding of where one token ends, and the tokens that they stand for."""
    logits = np.einsum("btd,vd->btv", hidden, head, dtype=np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    ends = np.cumsum(probs, -1) / probs.sum(-1, keepdims=True)
    fractions = np.random.default_rng(2).random(hidden.shape[:2]).astype(np.float32)
    near = np.min(np.abs(ends - fractions[..., None]), axis=-1) < 1e-5
    assert np.mean(near) < 0.05
    fractions = np.where(near, 0.0, fractions)
    return jnp.asarray(fractions, jnp.float32), np.sum(ends <= fractions[..., None], axis=-1)


# Fewer tokens than are searched together, twice as many, a remainder, and a multiple of 64 alone.
@pytest.mark.parametrize(("vocabulary", "dtype"), [(V, None), (512, None), (599, None), (448, None), (V, "bfloat16")])
def test_a_drawn_token_is_where_its_fraction_of_the_probability_ends(vocabulary: int, dtype: str | None) -> None:
    rng = np.random.default_rng(1)
    drawn = (rng.standard_normal((3, 401, D)), rng.standard_normal((vocabulary, D)))
    hidden, head = (np.asarray(jnp.asarray(array, dtype), np.float32) for array in drawn)
    weights = jnp.asarray(rng.random((3, 401)) < 0.7, jnp.float32)
    fractions, tokens = draw_fractions(hidden, head)
    assert len(np.unique(tokens)) > vocabulary / 3 and tokens.max() > 0.98 * (vocabulary - 1)
    found = jax.value_and_grad(drawn_cross_entropy, has_aux=True)(jnp.asarray(hidden), head, fractions, weights, dtype)
    expected = jax.value_and_grad(cross_entropy, has_aux=True)(jnp.asarray(hidden), head, tokens, weights, dtype)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_the_largest_fraction_draws_a_token() -> None:
    hidden, head, targets, weights = draw(2, 5, 1.0)
    most = jnp.full(targets.shape, np.nextafter(np.float32(1), np.float32(0)))
    found = jax.grad(lambda x: drawn_cross_entropy(x, head, most, weights)[0])(hidden)
    last = jax.grad(lambda x: cross_entropy(x, head, jnp.full_like(targets, V - 1), weights)[0])(hidden)
    np.testing.assert_allclose(found, last, rtol=1e-5, atol=1e-6)


def test_on_a_mesh_the_same_tokens_are_drawn() -> None:
    """Rows over `data`, the vocabulary over `tensor`; three chunks."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((4, 300, D)).astype(np.float32)
    head = rng.standard_normal((1200, D)).astype(np.float32)
    weights = np.ones((4, 300), np.float32)
    fractions, tokens = draw_fractions(hidden, head)
    expected = jax.grad(lambda x: cross_entropy(x, head, tokens, weights)[0])(jnp.asarray(hidden))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        states, placed_head, *rows = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in (
                (hidden, P(("data", "fsdp"))),
                (head, P(("tensor", "fsdp"))),
                (fractions, P(("data", "fsdp"))),
                (weights, P(("data", "fsdp"))),
            )
        ]
        found = jax.jit(jax.grad(lambda x: drawn_cross_entropy(x, placed_head, *rows)[0]))(states)
    # Devices sum their parts of the vocabulary apart; another token would be another row of the head.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * float(jnp.max(jnp.abs(expected))))


def test_tokens_of_a_text_are_whole_numbers() -> None:
    hidden, head, _, weights = draw(2, 5, 1.0)
    with pytest.raises(TypeError, match="integer"):
        cross_entropy(hidden, head, jnp.full((2, 5), 0.5), weights)
