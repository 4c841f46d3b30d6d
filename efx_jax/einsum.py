"""Products summed in float32: the model's at the precision of their operands, an event's at the highest precision."""

import functools
import itertools

import jax
import jax.numpy as jnp

from efx_jax.parallel.mesh import active_mesh

Array = jax.Array
# A Gram is formed in blocks of about this width, up to this number of blocks; wider inputs get wider blocks.
_GRAM_BLOCK, _GRAM_BLOCKS = 512, 4


def dot(equation: str, x: Array, y: Array) -> Array:
    """The model's products: bfloat16 operands as the hardware multiplies them, float32 operands in float32.

    By default GPUs would keep only 10 bits of float32 operands (TF32).
    """
    precision = "highest" if jnp.result_type(x, y) == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def einsum(equation: str, *operands: Array) -> Array:
    """Products of weights and Grams, at the highest precision whatever the operands are."""
    return jnp.einsum(equation, *operands, precision="highest", preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: Array, y: Array) -> Array:
    """`einsum(equation, x, y)` with float32 sums, whose backward pass casts the cotangent to the operands' dtype.

    Without the cast the backward pass mixes float32 and bfloat16 operands, which no fast GEMM takes. Every index of an
    operand must also occur in the other operand or in the output.
    """
    return dot(equation, x, y)


def _contract_fwd(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(equation, x, y), (x, y)


def _contract_bwd(equation: str, residuals: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
    x, y = residuals
    inputs, z_axes = equation.split("->")
    x_axes, y_axes = inputs.split(",")
    dz = dz.astype(x.dtype)
    dx = dot(f"{z_axes},{y_axes}->{x_axes}", dz, y)
    dy = dot(f"{z_axes},{x_axes}->{y_axes}", dz, x)
    return dx.astype(x.dtype), dy.astype(y.dtype)


contract.defvjp(_contract_fwd, _contract_bwd)


def weight_gradient(dy: Array, x: Array) -> Array:
    """dU = dy^T x, the sum over all tokens: `dy [...,O]`, `x [...,I]` -> `[O,I]`, float32."""

    plain = functools.partial(dot, "...o,...i->oi")

    def transposed_first(dy: Array, x: Array) -> Array:
        # XLA's CPU backend contracts bfloat16 over a leading axis 2 to 4 times slower than over a trailing one, and
        # folds a bare transpose back into the slow product; the padding (zeros, which add nothing) keeps it apart.
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        columns = jnp.pad(flat_dy.T, ((0, 0), (0, 32)))
        return dot("ot,ti->oi", columns, jnp.pad(flat_x, ((0, 32), (0, 0))))

    if x.dtype != jnp.bfloat16:
        return plain(dy, x)
    return jax.lax.platform_dependent(dy, x, cpu=transposed_first, default=plain)


def gram_matrix(x: Array) -> Array:
    """x^T x, the sum over all tokens: `x [...,I]` -> `[I,I]`, float32.

    For wide inputs, blocks below the diagonal are copies, see `gram_share`. On a mesh, where the partitioner would move
    blocks between devices to assemble them, the whole Gram is computed.
    """
    width = x.shape[-1]
    edges = (0, width) if active_mesh() is not None else _gram_edges(width)
    found = jnp.zeros((width, width), jnp.float32)
    for start, stop in itertools.pairwise(edges):
        strip = weight_gradient(x[..., start:stop], x[..., start:])
        found = found.at[start:stop, start:].set(strip).at[stop:, start:stop].set(strip[:, stop - start :].T)
    return found


def gram_share(width: int) -> float:
    """Share of a Gram's products that `gram_matrix` forms on one device: from 1 for narrow inputs to 5/8 for wide."""
    return sum((stop - start) * (width - start) for start, stop in itertools.pairwise(_gram_edges(width))) / width**2


def _gram_edges(width: int) -> tuple[int, ...]:
    count = min(-(-width // _GRAM_BLOCK), _GRAM_BLOCKS)
    return tuple(width * index // count for index in range(count + 1))
