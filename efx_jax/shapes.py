"""Checks of shapes. Broadcasting would turn an array of a wrong shape into a wrong number, without a word."""

from typing import Any

from efx_jax.errors import InputError


def require_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Refuses an array of another shape.

    Args:
        name: the argument, for the message.
        array: anything with a `shape`.
        shape: the expected one.

    Raises:
        InputError: `array` has another shape.
    """
    if tuple(array.shape) != shape:
        raise InputError(f"{name}: expected shape {list(shape)}, found {list(array.shape)}; pass the one that fits")


def require_mask(mask: Any, weight: Any) -> None:
    """Refuses whatever is not a bool mask of the shape of `weight`, such as one packed into bits.

    Raises:
        InputError: `mask` has another dtype or shape.
    """
    if mask.dtype != bool or mask.shape != weight.shape:
        raise InputError(
            f"mask: expected bool {list(weight.shape)}, found {mask.dtype} {list(mask.shape)}; "
            "unpack bits by efx_jax.masks.unpack_mask, and turn numbers into a comparison (mask != 0)"
        )


def require_refit(weight: Any, mask: Any, gram: Any, target: Any = None) -> None:
    """Refuses a mask `[O,I]`, a Gram `[I,I]` or a target `[O,I]` that does not belong to `weight [O,I]`.

    Raises:
        InputError: one of them has another shape, or the mask is not bool.
    """
    require_mask(mask, weight)
    require_shape("gram", gram, (weight.shape[1], weight.shape[1]))
    if target is not None:
        require_shape("target", target, tuple(weight.shape))
