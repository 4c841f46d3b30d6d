"""Products of weights and Grams: float32 at the highest matmul precision, whatever the operands are."""

import functools

import jax.numpy as jnp

einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
