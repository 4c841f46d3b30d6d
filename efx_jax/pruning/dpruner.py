"""D-Pruner's criterion: general importance as a regulariser of a domain pass that sums a three-term importance.

Source: arXiv 2405.06275 and compressionOrg/D-Pruner. One function per formula; `efx_jax.training.importance` runs the
pass. The released code does not run unmodified, see docs/method.md.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
_EXAMPLES = 1000
"""Number of examples by which the released code divides its sums over training examples, whatever the data."""


def regularised_gradient(
    gradient: Array, general: Array, learning_rate: Array | float, weight: Array | float = 0.1
) -> Array:
    """g + weight * 2 lr^2 G g^2 / 1000, which holds back what matters for general text.

    It stands for the gradient of weight * sum G (W' - W)^2 with W' - W = -lr g for the next step and a Fisher Hessian.

    Args:
        gradient: g `[...,O,I]` of the mean loss on the domain, scaled or not.
        general: G `[...,O,I]`, SparseGPT's importance of the entry on general text: w^2 / d^2 with d the diagonal of
            the upper Cholesky factor of the inverse Hessian 2 X^T X / sequences (`efx_jax.pruning.sparsegpt`).
        learning_rate: that of the step.
        weight: lambda.

    Returns:
        float32 `[...,O,I]`.
    """
    gradient = gradient.astype(jnp.float32)
    return gradient + weight * 2 * learning_rate**2 * general * jnp.square(gradient) / _EXAMPLES


def three_term_importance(weight: Array, gradient: Array) -> Array:
    """|g w + (g w)^2 / 2000 + w^3|: Taylor's first term, half a Fisher term over 1,000 examples, and the remainder.

    The paper gives the remainder as of order w^3, and the code takes w^3 itself. The first term is negligible beside it
    unless the loss is scaled up, as it is in the authors' half-precision pass (docs/method.md).

    Args:
        weight: w `[...,O,I]` before the step.
        gradient: g `[...,O,I]`, regularised and not clipped; of the scaled loss.

    Returns:
        float32 `[...,O,I]`, to be summed over the steps.
    """
    weight = weight.astype(jnp.float32)
    first = gradient.astype(jnp.float32) * weight
    return jnp.abs(first + jnp.square(first) / (2 * _EXAMPLES) + weight**3)


def clip_factor(norm: Array, most: float) -> Array:
    """The factor on all gradients of a step: 1, or less where their global norm exceeds `most`."""
    return jnp.minimum(most / (norm + 1e-6), 1.0)
