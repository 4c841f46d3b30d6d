"""Products summed in float32: the model's at the precision of their operands, an event's at the highest."""

import jax
import jax.numpy as jnp

Array = jax.Array


def dot(equation: str, x: Array, y: Array) -> Array:
    """What the model computes: of bfloat16 operands as the hardware does it, of float32 operands in float32.

    By default GPUs would keep 10 bits of float32 operands (TF32).
    """
    precision = "highest" if jnp.result_type(x, y) == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def einsum(equation: str, *operands: Array) -> Array:
    """Products of weights and Grams: at the highest precision, whatever the operands are."""
    return jnp.einsum(equation, *operands, precision="highest", preferred_element_type=jnp.float32)
