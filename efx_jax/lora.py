"""LoRA under a mask as pure functions: the effective weight U = W + scale * B A, and the merged weight mask * U.

`effective_weight` forms U, in float32, for scores, recovery, `merge` and every linear that needs it whole. Two places
apply the scale themselves: `efx_jax.linear` where it multiplies by A and B in turn, and `weights.merged` in float64.
Linears and adapters are stored as Hugging Face and PEFT store them: W `[O,I]`, A `[R,I]`, B `[O,R]`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.einsum import einsum
from efx_jax.errors import InputError
from efx_jax.masks import check_mask, unpack_mask

Array = jax.Array


@struct.dataclass
class Adapters:
    """LoRA adapters of a whole model.

    `lora_a[name] [L,R,I]` and `lora_b[name] [L,O,R]` for every adapted linear; `scale` is alpha / R (rsLoRA:
    alpha / sqrt(R)) and static.
    """

    lora_a: dict[str, Array]
    lora_b: dict[str, Array]
    scale: float = struct.field(pytree_node=False)


def lora_scale(rank: int, alpha: float, rslora: bool = False) -> float:
    """alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def init_lora_matrices(
    key: Array, shapes: Mapping[str, tuple[int, int, int]], rank: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Draws A from U(-1/sqrt(I), 1/sqrt(I)) (Kaiming uniform, a = sqrt 5, as PEFT does) and sets B to zero.

    Args:
        key: PRNG key.
        shapes: name -> (L, O, I) of every adapted linear.
        rank: R.

    Returns:
        `lora_a[name] [L,R,I]` and `lora_b[name] [L,O,R]`, float32.
    """
    lora_a, lora_b = {}, {}
    for index, (name, (layers, out_dim, in_dim)) in enumerate(sorted(shapes.items())):
        bound = 1.0 / math.sqrt(in_dim)
        shape = (layers, rank, in_dim)
        lora_a[name] = jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)
        lora_b[name] = jnp.zeros((layers, out_dim, rank), jnp.float32)
    return lora_a, lora_b


def init_lora(
    key: Array,
    params: Mapping[str, Any],
    spec: Any,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
) -> Adapters:
    """Fresh adapters: the model's output is unchanged, since B is zero.

    Args:
        key: PRNG key for A.
        params: the parameter tree; only shapes are read.
        spec: the model's spec; not read, since the shapes of the parameters suffice.
        rank: R.
        alpha: numerator of the scale.
        targets: names of the linears to adapt; all seven by default.
        rslora: scale by alpha / sqrt(R).

    Raises:
        InputError: a target that the model does not have, a rank below 1, or an alpha that is not above 0.
    """
    layers = params["layers"]
    linears = _linears(layers)
    chosen = list(linears if targets is None else targets)
    unknown = [name for name in chosen if name not in linears]
    if unknown or rank < 1 or alpha <= 0:
        raise InputError(
            f"init_lora: expected targets among {', '.join(linears)}, a rank of at least 1 and an alpha above 0, "
            f"found {', '.join(unknown) or 'no unknown target'}, rank {rank} and alpha {alpha}"
        )
    lora_a, lora_b = init_lora_matrices(key, {name: layers[name].shape for name in chosen}, rank)
    return Adapters(lora_a=lora_a, lora_b=lora_b, scale=lora_scale(rank, alpha, rslora))


def _linears(layers: Mapping[str, Array]) -> list[str]:
    return [name for name in layers if name.endswith("_proj")]


def effective_weight(weight: Array, lora_a: Array | None, lora_b: Array | None, scale: float) -> Array:
    """U = W + scale * B A in float32.

    Args:
        weight: W `[...,O,I]`.
        lora_a: A `[...,R,I]`, or None for a linear without an adapter.
        lora_b: B `[...,O,R]`, or None.
        scale: alpha / R.

    Returns:
        U `[...,O,I]`, float32.
    """
    weight = weight.astype(jnp.float32)
    if lora_a is None or lora_b is None:
        return weight
    delta = einsum("...or,...ri->...oi", lora_b, lora_a)
    return weight + scale * delta


def masked_weight(weight: Array, lora_a: Array | None, lora_b: Array | None, mask: Array | None, scale: float) -> Array:
    """mask * U in float32, with exact zeros where the mask `[...,O,I]`, bool or packed, is False; None keeps all."""
    effective = effective_weight(weight, lora_a, lora_b, scale)
    return effective if mask is None else jnp.where(unpack_mask(mask, weight.shape[-1]), effective, 0.0)


def merge(params: Mapping[str, Any], adapters: Adapters | None, masks: Mapping[str, Array] | None) -> dict[str, Any]:
    """Folds adapters and masks into the base: every linear becomes mask * U, rounded once to its own dtype.

    Args:
        params: the parameter tree, linears `[L,O,I]`.
        adapters: adapters, or None.
        masks: name -> mask `[L,O,I]`, True = kept, or None.

    Returns:
        A new parameter tree; pruned entries are exactly 0 and untouched leaves are the same arrays.

    Raises:
        InputError: an adapter or a mask of a linear that the model does not have, or of the wrong shape.
    """
    check_fit(params["layers"], adapters, masks)
    lora_a = {} if adapters is None else adapters.lora_a
    lora_b = {} if adapters is None else adapters.lora_b
    scale = 0.0 if adapters is None else adapters.scale
    return {**params, "layers": merge_linears(params["layers"], lora_a, lora_b, masks or {}, scale)}


def check_fit(weights: Mapping[str, Array], adapters: Adapters | None, masks: Mapping[str, Array] | None) -> None:
    """Refuses adapters and masks that fit no linear of the model; they would be silently ignored.

    Args:
        weights: the model's stacked arrays; linears `[L,O,I]`.
        adapters: adapters, or None.
        masks: name -> mask `[L,O,I]`, bool or packed, or None.

    Raises:
        InputError: an adapter or a mask of no linear of the model, or of the wrong shape.
    """
    linears = _linears(weights)
    named = {"adapters": {} if adapters is None else adapters.lora_a, "masks": masks or {}}
    for kind, arrays in named.items():
        if not arrays.keys() <= set(linears):
            unknown = ", ".join(sorted(arrays.keys() - set(linears)))
            raise InputError(f"{kind}: expected names among {', '.join(linears)}, found {unknown}")
    if adapters is not None:
        if adapters.lora_a.keys() != adapters.lora_b.keys():
            odd = ", ".join(sorted(adapters.lora_a.keys() ^ adapters.lora_b.keys()))
            raise InputError(f"adapters: expected both A and B of every linear, found only one of {odd}")
        for name, lora_a in adapters.lora_a.items():
            lora_b, (num_layers, out_dim, in_dim) = adapters.lora_b[name], weights[name].shape
            rank = lora_a.shape[-2] if lora_a.ndim > 1 else 0
            if lora_a.shape != (num_layers, rank, in_dim) or lora_b.shape != (num_layers, out_dim, rank):
                raise InputError(
                    f"adapter of {name}: expected A [L,R,I] and B [L,O,R] for a weight {weights[name].shape}, "
                    f"found A {lora_a.shape} and B {lora_b.shape}"
                )
    for name, mask in (masks or {}).items():
        check_mask(mask, weights[name].shape[-1])
        if mask.shape[:-1] != weights[name].shape[:-1]:
            raise InputError(f"mask of {name}: expected [L,O,I] {weights[name].shape}, found {mask.shape}")


def merge_linears(
    weights: Mapping[str, Array],
    lora_a: Mapping[str, Array],
    lora_b: Mapping[str, Array],
    masks: Mapping[str, Array],
    scale: float,
) -> dict[str, Array]:
    """`weights` with mask * U for every adapted or masked linear, rounded once to its own dtype; `[...,O,I]` each."""
    merged = dict(weights)
    # In the same order in all processes: each of them traces the program itself.
    for name in dict.fromkeys((*lora_a, *masks)):
        merged[name] = _merged(weights[name], lora_a.get(name), lora_b.get(name), masks.get(name), scale)
    return merged


@functools.partial(jax.jit, static_argnums=4)
def _merged(weight: Array, lora_a: Array | None, lora_b: Array | None, mask: Array | None, scale: float) -> Array:
    """One program, so that no whole float32 copy of a stacked matrix ever exists."""
    return masked_weight(weight, lora_a, lora_b, mask, scale).astype(weight.dtype)
