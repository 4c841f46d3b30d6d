"""LoRAPrune's criterion: how much a weight matters to the loss, estimated from its adapter's gradients alone.

Source: arXiv 2305.18403 and aim-uofa/LoRAPrune, which sum it over heads and channels. Here every entry has its own.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from efx_jax.einsum import einsum
from efx_jax.errors import InputError
from efx_jax.lora import Adapters, effective_weight

Array = jax.Array
AdapterGradients = Mapping[str, Mapping[str, Array]]


def estimated_gradient(lora_a: Array, lora_b: Array, grad_a: Array, grad_b: Array) -> Array:
    """g = dB A + B dA - dB dA: how much B A shrinks when A and B take one plain gradient step of size 1.

    With G the gradient of the effective weight W + scale * B A, dB = scale * G A^T and dA = scale * B^T G, hence
    g = scale (G A^T A + B B^T G) - scale^2 G A^T B^T G. The scale is a common factor of the first two terms and changes
    no ranking; relative to them, the third grows with scale and with the size of the loss, so a loss summed over tokens
    instead of averaged gives another criterion. At B = 0 only G A^T A is left: G seen through the R rows of A.

    Args:
        lora_a: A `[...,R,I]`.
        lora_b: B `[...,O,R]`.
        grad_a: gradient of the mean loss by A `[...,R,I]`.
        grad_b: by B `[...,O,R]`.

    Returns:
        float32 `[...,O,I]`.
    """
    return einsum("...or,...ri->...oi", grad_b, lora_a) + einsum("...or,...ri->...oi", lora_b - grad_b, grad_a)


def lora_gradient_score(
    weight: Array, lora_a: Array, lora_b: Array, grad_a: Array, grad_b: Array, scale: float
) -> Array:
    """|g * U|, first-order change of the loss when an entry of U = W + scale * B A goes, g from `estimated_gradient`.

    Args:
        weight: W `[...,O,I]`.
        lora_a: A `[...,R,I]`.
        lora_b: B `[...,O,R]`.
        grad_a: gradient of the mean loss by A `[...,R,I]`.
        grad_b: by B `[...,O,R]`.
        scale: alpha / R.

    Returns:
        float32 `[...,O,I]`.
    """
    gradient = estimated_gradient(lora_a, lora_b, grad_a, grad_b)
    return jnp.abs(gradient * effective_weight(weight, lora_a, lora_b, scale))


def lora_gradient_importance(
    layers: Mapping[str, Array], adapters: Adapters, gradients: AdapterGradients, names: Iterable[str]
) -> dict[str, Array]:
    """`lora_gradient_score` of some linears of a whole model.

    Args:
        layers: stacked arrays of the blocks, W `[L,O,I]` by name.
        adapters: the adapters.
        gradients: of the mean loss, `lora_a` and `lora_b` by name as in the adapters.
        names: linears to score.

    Returns:
        name -> float32 `[L,O,I]`.

    Raises:
        InputError: a linear without an adapter, which has no such gradients.
    """
    names = tuple(names)
    bare = [name for name in names if name not in adapters.lora_a]
    if bare:
        raise InputError(
            f"prune.score lora_gradient: expected adapters on all of prune.targets, found none on {', '.join(bare)}; "
            "add them to lora.targets"
        )
    return {
        name: lora_gradient_score(
            layers[name],
            adapters.lora_a[name],
            adapters.lora_b[name],
            gradients["lora_a"][name],
            gradients["lora_b"][name],
            adapters.scale,
        )
        for name in names
    }
