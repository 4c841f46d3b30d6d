"""What tests against NumPy oracles share: inputs like those of a layer, and the way to float32."""

import jax
import jax.numpy as jnp
import numpy as np


def correlated_inputs(seed: int, tokens: int, width: int) -> np.ndarray:
    """Correlated inputs `[tokens,I]`."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, width)) @ (rng.standard_normal((width, width)) + np.eye(width))


def single(*arrays: np.ndarray) -> list[jax.Array]:
    """As float32 on the device; masks stay bool."""
    return [jnp.asarray(array if array.dtype == bool else array.astype(np.float32)) for array in arrays]
