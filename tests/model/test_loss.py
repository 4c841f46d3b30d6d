"""The chunked loss equals optax's on the positions that carry weight, and reads no others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efx_jax.config import MeshConfig
from efx_jax.model.loss import cross_entropy, draw_tokens
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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tokens_are_drawn_as_often_as_the_model_expects_them(dtype: str | None) -> None:
    """Two positions in turn, 4,000 draws of each, in sixteen chunks, the last of which is not full."""
    hidden, head, _, _ = draw(1, 2, 1.0)
    rows, repeats = 8, 500
    many = jnp.tile(hidden, (rows, repeats, 1))
    keys = jax.random.split(jax.random.key(3), rows)
    found = draw_tokens(many, head, keys, dtype)
    assert found.shape == (rows, 2 * repeats) and found.dtype == jnp.int32
    expected = jax.nn.softmax(jnp.einsum("td,vd->tv", hidden[0], head, precision="highest"))
    for place in range(2):
        seen = np.bincount(np.asarray(found)[:, place::2].reshape(-1), minlength=V) / (rows * repeats)
        spread = np.sqrt(np.asarray(expected[place]) / (rows * repeats))
        # Thirty-seven comparisons; a share in bfloat16 is off by a hundredth of itself.
        assert np.all(np.abs(seen - expected[place]) < 4 * spread + (0.02 if dtype else 1e-3) * expected[place] + 3e-4)
    # A row's tokens are its own, whatever stands beside and behind it.
    np.testing.assert_array_equal(draw_tokens(many[5:7, :300], head, keys[5:7], dtype), found[5:7, :300])
    assert len({tuple(row) for row in np.asarray(found).tolist()}) == rows


def test_on_a_mesh_the_same_tokens_are_drawn() -> None:
    """Rows over `data`, the vocabulary over `tensor`; three chunks."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((4, 300, D)).astype(np.float32)
    head = rng.standard_normal((40, D)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 4)
    alone = draw_tokens(hidden, head, keys)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in ((hidden, P(("data", "fsdp"))), (head, P(("tensor", "fsdp"))))
        ]
        found = jax.jit(draw_tokens)(*placed, keys)
    np.testing.assert_array_equal(found, alone)
