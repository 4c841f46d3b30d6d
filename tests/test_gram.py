"""Products over all tokens: the gradient of a weight and the Gram of an input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efx_jax.config import MeshConfig
from efx_jax.einsum import gram_matrix, gram_share
from efx_jax.parallel.mesh import make_mesh


# One block; two of unlike width; as many as are formed.
@pytest.mark.parametrize("width", [7, 701, 2303])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gram_is_the_sum_of_outer_products(width: int, dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, width)), dtype)
    rows = np.asarray(x, np.float64).reshape(-1, width)
    found = jax.jit(gram_matrix)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, rows.T @ rows, rtol=1e-5, atol=1e-4)


def test_three_eighths_of_a_wide_gram_are_copied() -> None:
    """Products of 2,304 columns in four blocks: 10 of 16 are formed."""
    assert [gram_share(width) for width in (512, 1024, 1536, 4096)] == pytest.approx([1, 3 / 4, 2 / 3, 5 / 8])
    x = jnp.zeros((16, 2304))
    operations = jax.jit(gram_matrix).lower(x).cost_analysis()["flops"]
    whole = 2 * 16 * 2304**2
    assert operations == pytest.approx(whole * 10 / 16, rel=0.01)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
        assert jax.jit(gram_matrix).lower(x).cost_analysis()["flops"] == pytest.approx(whole, rel=0.01)
