"""LoRA under a mask as pure functions: the effective weight U = W + scale * B A, and the linear y = x (mask * U)^T.

`effective_weight` is the only place where the scale meets the adapters; score, recovery, forward and merge all call it.
Linears and adapters are stored as Hugging Face and PEFT store them: W `[O,I]`, A `[R,I]`, B `[O,R]`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import struct

from efx_jax.config import MaskForward
from efx_jax.errors import InputError

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
        spec: the model's spec.
        rank: R.
        alpha: numerator of the scale.
        targets: names of the linears to adapt; all seven by default.
        rslora: scale by alpha / sqrt(R).

    Raises:
        InputError: a target that the model does not have, or a rank below 1.
    """
    layers = params["layers"]
    linears = [name for name in layers if name.endswith("_proj")]
    chosen = list(linears if targets is None else targets)
    unknown = [name for name in chosen if name not in linears]
    if unknown or rank < 1:
        raise InputError(
            f"init_lora: expected targets among {', '.join(linears)} and a rank of at least 1, "
            f"found {', '.join(unknown) or 'no unknown target'} and rank {rank}"
        )
    lora_a, lora_b = init_lora_matrices(key, {name: layers[name].shape for name in chosen}, rank)
    return Adapters(lora_a=lora_a, lora_b=lora_b, scale=lora_scale(rank, alpha, rslora))


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
    delta = jnp.einsum("...or,...ri->...oi", lora_b, lora_a, precision="highest", preferred_element_type=jnp.float32)
    return weight + scale * delta


def masked_weight(weight: Array, lora_a: Array | None, lora_b: Array | None, mask: Array | None, scale: float) -> Array:
    """mask * U in float32, with exact zeros where the mask `[...,O,I]` is False (True = kept; None keeps all)."""
    effective = effective_weight(weight, lora_a, lora_b, scale)
    return effective if mask is None else jnp.where(mask, effective, 0.0)


def merge(params: Mapping[str, Any], adapters: Adapters | None, masks: Mapping[str, Array] | None) -> dict[str, Any]:
    """Folds adapters and masks into the base: every linear becomes mask * U, rounded once to its own dtype.

    Args:
        params: the parameter tree, linears `[L,O,I]`.
        adapters: adapters, or None.
        masks: name -> bool `[L,O,I]`, True = kept, or None.

    Returns:
        A new parameter tree; pruned entries are exactly 0 and untouched leaves are the same arrays.
    """
    lora_a = {} if adapters is None else adapters.lora_a
    lora_b = {} if adapters is None else adapters.lora_b
    scale = 0.0 if adapters is None else adapters.scale
    return {**params, "layers": merge_linears(params["layers"], lora_a, lora_b, masks or {}, scale)}


def merge_linears(
    weights: Mapping[str, Array],
    lora_a: Mapping[str, Array],
    lora_b: Mapping[str, Array],
    masks: Mapping[str, Array],
    scale: float,
) -> dict[str, Array]:
    """`weights` with mask * U for every adapted or masked linear, rounded once to its own dtype; `[...,O,I]` each."""
    merged = dict(weights)
    for name in {*lora_a, *masks}:
        weight = weights[name]
        masked = masked_weight(weight, lora_a.get(name), lora_b.get(name), masks.get(name), scale)
        merged[name] = masked.astype(weight.dtype)
    return merged


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    lora_a: Array | None = None,
    lora_b: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float = 1.0,
    mask_forward: MaskForward = "exact",
    compute_dtype: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """One linear of the model, with its adapter and its mask.

    Operands are cast to `compute_dtype`, sums are float32, and the result has the dtype of `x`.

    Args:
        x: `[...,I]`.
        weight: W `[O,I]`.
        bias: `[O]` or None.
        lora_a: A `[R,I]` or None.
        lora_b: B `[O,R]` or None.
        mask: bool `[O,I]`, True = kept, or None.
        scale: alpha / R.
        mask_forward: "exact" y = x (mask * U)^T with true gradients; "ste" the same output, adapter gradients as if
            unmasked; "frozen" y = x (mask * W)^T + scale * (x A^T) B^T; "dense" y = x U^T, the mask unused.
        compute_dtype: dtype of the matmul operands; None takes the dtype of W.
        dropout_rate: share of the adapter's inputs set to zero (training only).
        dropout_key: PRNG key of the dropout; None means no dropout.

    Returns:
        y `[...,O]`.

    Raises:
        InputError: an unknown `mask_forward`.
    """
    if mask_forward not in get_args(MaskForward):
        raise InputError(f"mask_forward must be one of {', '.join(get_args(MaskForward))}, found {mask_forward!r}")
    dtype = weight.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    inputs = x.astype(dtype)
    adapted = lora_a is not None and lora_b is not None
    if mask_forward == "dense":
        mask = None
    dropping = adapted and dropout_key is not None and dropout_rate > 0.0
    if not adapted or dropping or mask is None or mask_forward == "frozen":
        y = jax.checkpoint(_base_output)(inputs, weight, mask)
        if adapted:
            kept = x if not dropping or dropout_key is None else _dropout(x, dropout_rate, dropout_key)
            delta_mask = mask if mask_forward in ("exact", "ste") else None
            y = y + _adapter_output(kept.astype(dtype), lora_a, lora_b, delta_mask, scale, mask_forward)
    else:
        y = _masked_linear(inputs, weight, lora_a, lora_b, mask, scale, mask_forward == "exact")
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _base_output(x: Array, weight: Array, mask: Array | None) -> Array:
    """x (mask * W)^T in the dtype of `x`. Checkpointed, so that no masked or cast copy of W waits for the backward."""
    base = weight if mask is None else jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    return contract("...i,oi->...o", x, base.astype(x.dtype))


def _dropout(x: Array, rate: float, key: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


def _adapter_output(
    x: Array, lora_a: Array | None, lora_b: Array | None, mask: Array | None, scale: float, mask_forward: MaskForward
) -> Array:
    """scale * x (mask * BA)^T, or the cheap low-rank product where nothing is masked."""
    assert lora_a is not None and lora_b is not None
    if mask is not None:
        nothing = jnp.zeros((lora_b.shape[0], lora_a.shape[1]), x.dtype)
        return _masked_linear(x, nothing, lora_a, lora_b, mask, scale, mask_forward == "exact")
    hidden = contract("...i,ri->...r", x, lora_a.astype(x.dtype)).astype(x.dtype)
    return scale * contract("...r,or->...o", hidden, lora_b.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _masked_linear(
    x: Array, weight: Array, lora_a: Array, lora_b: Array, mask: Array, scale: float, exact: bool
) -> Array:
    """y = x (mask * U)^T, float32 `[...,O]`; U is formed again in the backward pass instead of being kept."""
    effective = masked_weight(weight, lora_a, lora_b, mask, scale).astype(x.dtype)
    return jnp.einsum("...i,oi->...o", x, effective, preferred_element_type=jnp.float32)


def _masked_linear_fwd(
    x: Array, weight: Array, lora_a: Array, lora_b: Array, mask: Array, scale: float, exact: bool
) -> tuple[Array, tuple[Array, ...]]:
    return _masked_linear(x, weight, lora_a, lora_b, mask, scale, exact), (x, weight, lora_a, lora_b, mask)


def _masked_linear_bwd(scale: float, exact: bool, residuals: tuple[Array, ...], dy: Array) -> tuple[Any, ...]:
    x, weight, lora_a, lora_b, mask = residuals
    dy = dy.astype(x.dtype)
    effective = masked_weight(weight, lora_a, lora_b, mask, scale).astype(x.dtype)
    dx = jnp.einsum("...o,oi->...i", dy, effective, preferred_element_type=jnp.float32).astype(x.dtype)
    # The gradient of W costs nothing extra: it is dU, which the exact adapter gradients need, and where nobody asks
    # for it (or, with ste, for it alone) the compiler drops it.
    d_effective = weight_gradient(dy, x)
    d_weight = jnp.where(mask, d_effective, 0.0)
    if exact:
        d_lora_a = scale * jnp.einsum("or,oi->ri", lora_b, d_weight)
        d_lora_b = scale * jnp.einsum("oi,ri->or", d_weight, lora_a)
    else:
        hidden = jnp.einsum("...i,ri->...r", x, lora_a.astype(x.dtype), preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("...o,or->...r", dy, lora_b.astype(x.dtype), preferred_element_type=jnp.float32)
        d_lora_a = scale * jnp.einsum("...r,...i->ri", d_hidden.astype(x.dtype), x, preferred_element_type=jnp.float32)
        d_lora_b = scale * jnp.einsum("...o,...r->or", dy, hidden.astype(x.dtype), preferred_element_type=jnp.float32)
    return (
        dx,
        d_weight.astype(weight.dtype),
        d_lora_a.astype(lora_a.dtype),
        d_lora_b.astype(lora_b.dtype),
        None,
    )


def weight_gradient(dy: Array, x: Array) -> Array:
    """dU = dy^T x, the sum over all tokens: `dy [...,O]`, `x [...,I]` -> `[O,I]`, float32."""

    def plain(dy: Array, x: Array) -> Array:
        return jnp.einsum("...o,...i->oi", dy, x, preferred_element_type=jnp.float32)

    def transposed_first(dy: Array, x: Array) -> Array:
        # XLA's CPU backend contracts bfloat16 over a leading axis 2 to 4 times slower than over a trailing one, and
        # folds a bare transpose back into the slow product; the padding (zeros, which add nothing) keeps it apart.
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        columns = jnp.pad(flat_dy.T, ((0, 0), (0, 32)))
        return jnp.einsum("ot,ti->oi", columns, jnp.pad(flat_x, ((0, 32), (0, 0))), preferred_element_type=jnp.float32)

    if x.dtype != jnp.bfloat16:
        return plain(dy, x)
    return jax.lax.platform_dependent(dy, x, cpu=transposed_first, default=plain)


_masked_linear.defvjp(_masked_linear_fwd, _masked_linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: Array, y: Array) -> Array:
    """`einsum(equation, x, y)` with float32 sums, whose backward pass casts the cotangent to the operands' dtype.

    Without the cast the backward pass mixes float32 and bfloat16 operands, which no fast GEMM takes. Every index of an
    operand must stand in the other operand or in the output.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _contract_fwd(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(equation, x, y), (x, y)


def _contract_bwd(equation: str, residuals: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
    x, y = residuals
    inputs, z_axes = equation.split("->")
    x_axes, y_axes = inputs.split(",")
    dz = dz.astype(x.dtype)
    dx = jnp.einsum(f"{z_axes},{y_axes}->{x_axes}", dz, y, preferred_element_type=jnp.float32)
    dy = jnp.einsum(f"{z_axes},{x_axes}->{y_axes}", dz, x, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dy.astype(y.dtype)


contract.defvjp(_contract_fwd, _contract_bwd)
