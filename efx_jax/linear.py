"""The linear y = x (mask * U)^T with its own backward pass, on one device or on a mesh.

Nothing of the size of a weight is saved for the backward pass, which forms U again. On a mesh (see
`efx_jax.parallel.partition`) both passes run inside `jax.shard_map`, because the gradient of U is a full matrix: the
partitioner would sum it over all devices before the mask and the adapters reduce it, which is as much traffic as the
model itself. Here every device reduces its own tokens' dU to dA and dB, and only those are summed.
"""

import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efx_jax.config import MaskForward
from efx_jax.einsum import dot, weight_gradient
from efx_jax.errors import InputError
from efx_jax.lora import masked_weight
from efx_jax.masks import unpack_mask
from efx_jax.parallel.partition import LinearAxes

Array = jax.Array
MaybeArray = Array | None
_Operands = tuple[Array, MaybeArray, MaybeArray, MaybeArray, MaybeArray]


class _How(NamedTuple):
    """The static part of a product. Without adapters every mode is a product with mask * W."""

    scale: float
    mode: MaskForward
    axes: LinearAxes | None
    sum_dtype: Any

    @property
    def forms_u(self) -> bool:
        return self.mode in ("exact", "ste")


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
    axes: LinearAxes | None = None,
) -> Array:
    """One linear of the model, with its adapter and its mask.

    Operands are cast to `compute_dtype`, sums are float32, and the result has the dtype of `x`; on a mesh, the partial
    sums added up over `tensor` have it too.

    Args:
        x: `[...,I]`.
        weight: W `[O,I]`.
        bias: `[O]` or None.
        lora_a: A `[R,I]` or None.
        lora_b: B `[O,R]` or None.
        mask: bool `[O,I]` or packed uint8 `[O,ceil(I/8)]` (`efx_jax.masks`), True = kept, or None.
        scale: alpha / R.
        mask_forward: "exact" y = x (mask * U)^T with true gradients; "ste" the same output, adapter gradients as if
            unmasked; "frozen" y = x (mask * W)^T + scale * (x A^T) B^T; "dense" y = x U^T, the mask unused.
        compute_dtype: dtype of the matmul operands; None takes the dtype of W.
        dropout_rate: share of the adapter's inputs set to zero (training only).
        dropout_key: PRNG key of the dropout, or `[B]` keys, one per row of x `[B,...,I]`; None means no dropout.
        axes: how this linear is sharded over the active mesh (`jax.set_mesh`); None on a single device.

    Returns:
        y `[...,O]`.

    Raises:
        InputError: an unknown `mask_forward`.
    """
    if mask_forward not in get_args(MaskForward):
        raise InputError(f"mask_forward must be one of {', '.join(get_args(MaskForward))}, found {mask_forward!r}")
    dtype = weight.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    adapted = lora_a is not None and lora_b is not None
    if mask_forward == "dense":
        mask = None
    how = _How(scale, mask_forward if mask is not None else "dense", axes, x.dtype)
    inputs = x.astype(dtype)
    if adapted and dropout_key is not None and dropout_rate > 0.0:
        dropped = _dropout(x, dropout_rate, dropout_key).astype(dtype)
        y = _product(how, inputs, weight, None, None, mask)
        y = y + _product(how, dropped, None, lora_a, lora_b, mask)
    else:
        y = _product(how, inputs, weight, lora_a, lora_b, mask)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def fold_in(key: Array, number: Array | int) -> Array:
    """`jax.random.fold_in` of one key, or of each of several `[B]`."""
    if _are_several(key):
        return jax.vmap(lambda each: jax.random.fold_in(each, number))(key)
    return jax.random.fold_in(key, number)


def _dropout(x: Array, rate: float, key: Array) -> Array:
    def draw(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.bernoulli(key, 1.0 - rate, shape)

    kept = jax.vmap(lambda each: draw(each, x.shape[1:]))(key) if _are_several(key) else draw(key, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


def _are_several(key: Array) -> bool:
    # A legacy key is an array of two integers.
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    how: _How, x: Array, weight: MaybeArray, lora_a: MaybeArray, lora_b: MaybeArray, mask: MaybeArray
) -> Array:
    """y `[...,O]`; without `weight` only the adapter's part, without adapters only the weight's."""
    operands = (x, weight, lora_a, lora_b, mask)
    if how.axes is None:
        return _forward(how, *operands)
    x_spec, y_spec, *others = _specs(how.axes, x.ndim)
    local = jax.shard_map(
        functools.partial(_forward, how), in_specs=(x_spec, *others), out_specs=y_spec, check_vma=False
    )
    return local(*operands)


def _product_fwd(how: _How, *operands: Any) -> tuple[Array, Any]:
    return _product(how, *operands), operands


def _product_bwd(how: _How, operands: _Operands, dy: Array) -> tuple[Any, ...]:
    if how.axes is None:
        gradients = _backward(how, *operands, dy)
    else:
        x_spec, y_spec, *others = _specs(how.axes, dy.ndim)
        gradients = jax.shard_map(
            functools.partial(_backward, how),
            in_specs=(x_spec, *others, y_spec),
            out_specs=(x_spec, *others[:3]),
            check_vma=False,
        )(*operands, dy)
    return (*gradients, None)


_product.defvjp(_product_fwd, _product_bwd)


def _specs(axes: LinearAxes, ndim: int) -> tuple[P, ...]:
    """Partitions of x, y, W, A, B and the mask."""
    rows, columns, batch = (part or None for part in axes)
    middle = (None,) * (ndim - 2)
    outputs = "tensor" if "tensor" in axes.rows else None
    matrix = P(rows, columns)
    return P(batch, *middle, columns), P(batch, *middle, outputs), matrix, P(None, columns), P(rows, None), matrix


def _forward(
    how: _How, x: Array, weight: MaybeArray, lora_a: MaybeArray, lora_b: MaybeArray, mask: MaybeArray
) -> Array:
    y = jnp.zeros((), jnp.float32)
    if weight is not None or how.forms_u:
        matrix = _gather(how, _matrix(how, x, weight, lora_a, lora_b, mask))
        y = dot("...i,oi->...o", x, matrix)
    if lora_a is not None and lora_b is not None and not how.forms_u:
        hidden = dot("...i,ri->...r", x, lora_a.astype(x.dtype)).astype(x.dtype)
        y = y + how.scale * dot("...r,or->...o", hidden, _gather(how, lora_b.astype(x.dtype)))
    return _sum(y.astype(how.sum_dtype), _columns(how)).astype(jnp.float32) if _columns(how) else y


def _matrix(how: _How, x: Array, weight: MaybeArray, lora_a: MaybeArray, lora_b: MaybeArray, mask: MaybeArray) -> Array:
    """What x is multiplied with, in the dtype of x: mask * U, or the weight's part of it."""
    if not how.forms_u:
        lora_a = lora_b = None
    elif weight is None:
        assert lora_a is not None and lora_b is not None
        weight = jnp.zeros((lora_b.shape[0], lora_a.shape[1]), x.dtype)
    assert weight is not None
    if lora_a is None:
        # No adapter inside: no detour through float32.
        return (weight if mask is None else jnp.where(_kept(mask, x), weight, 0)).astype(x.dtype)
    return masked_weight(weight, lora_a, lora_b, mask, how.scale).astype(x.dtype)


def _kept(mask: Array, x: Array) -> Array:
    return unpack_mask(mask, x.shape[-1])


def _backward(
    how: _How, x: Array, weight: MaybeArray, lora_a: MaybeArray, lora_b: MaybeArray, mask: MaybeArray, dy: Array
) -> tuple[Array, MaybeArray, MaybeArray, MaybeArray]:
    """Gradients of x, W, A and B."""
    dy = dy.astype(x.dtype)
    dx = jnp.zeros((), jnp.float32)
    d_weight = d_a = d_b = None
    if weight is not None or how.forms_u:
        matrix = _gather(how, _matrix(how, x, weight, lora_a, lora_b, mask))
        dx = dot("...o,oi->...i", dy, matrix)
        # The gradient of W costs nothing extra: it is dU, which the exact adapter gradients need, and the compiler
        # drops it where it is unused.
        d_matrix = weight_gradient(dy, x)
        if mask is not None:
            d_matrix = jnp.where(_kept(_gather(how, mask), x), d_matrix, 0.0)
        if weight is not None:
            d_weight = _sum_rows(how, d_matrix).astype(weight.dtype)
    if lora_a is not None and lora_b is not None:
        whole_b = _gather(how, lora_b)
        if how.mode == "exact":
            d_a = how.scale * dot("or,oi->ri", whole_b, d_matrix)
            d_b = _sum(how.scale * dot("oi,ri->or", d_matrix, lora_a), _columns(how))
        else:
            hidden = dot("...i,ri->...r", x, lora_a.astype(x.dtype))
            hidden = _sum(hidden, _columns(how)).astype(x.dtype)
            d_hidden = dot("...o,or->...r", dy, whole_b.astype(x.dtype)).astype(x.dtype)
            d_a = how.scale * dot("...r,...i->ri", d_hidden, x)
            d_b = how.scale * dot("...o,...r->or", dy, hidden)
            if not how.forms_u:
                dx = dx + how.scale * dot("...r,ri->...i", d_hidden, lora_a.astype(x.dtype))
        d_a = _sum(d_a, (*_batch(how), *_outputs(how))).astype(lora_a.dtype)
        d_b = _sum_rows(how, d_b).astype(lora_b.dtype)
    return _sum(dx.astype(x.dtype), _outputs(how)), d_weight, d_a, d_b


def _gather(how: _How, rows: Array) -> Array:
    """All rows of this device's tensor part of a matrix."""
    return rows if how.axes is None else jax.lax.all_gather(rows, "fsdp", axis=0, tiled=True)


def _columns(how: _How) -> tuple[str, ...]:
    return () if how.axes is None else how.axes.columns


def _outputs(how: _How) -> tuple[str, ...]:
    return () if how.axes is None else tuple(axis for axis in how.axes.rows if axis == "tensor")


def _batch(how: _How) -> tuple[str, ...]:
    return () if how.axes is None else how.axes.batch


def _sum(values: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(values, axes) if axes else values


def _sum_rows(how: _How, rows: Array) -> Array:
    """Sums the devices' partial results and keeps this device's rows: a reduce-scatter over `fsdp`."""
    if how.axes is None:
        return rows
    batch = set(how.axes.batch)
    if "fsdp" in batch:
        rows = jax.lax.psum_scatter(rows, "fsdp", scatter_dimension=0, tiled=True)
    else:
        own = rows.shape[0] // jax.lax.axis_size("fsdp")
        rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index("fsdp") * own, own)
    return _sum(rows, tuple(sorted(batch - {"fsdp"})))
