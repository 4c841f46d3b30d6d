"""A parameter tree as a source of tensors, of which each process provides the parts that it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, config_from_spec
from efx_jax.weights.byte_ranges import Part, normalized, part_shape, whole
from efx_jax.weights.source import DTYPES, TensorSource, leaves


def params_source(params: Mapping[str, Any], spec: ModelSpec, path: Path) -> TensorSource:
    """A parameter tree (jax or numpy arrays, sharded or not) as a source, read part by part.

    Of a shard's replicas on all devices of the run, one is written; sharded arrays are never gathered.

    Args:
        params: the tree of `param_shapes(spec)`.
        spec: its model.
        path: the path that the source reports.

    Raises:
        InputError: the tree is not `param_shapes(spec)`, or a leaf has an unsupported dtype.
    """
    arrays: dict[str, tuple[Any, int | None]] = {}
    for leaf in leaves(spec):
        branch = params["layers"] if leaf.stacked else params
        array = branch.get(leaf.path[-1])
        if array is None or tuple(array.shape) != leaf.shape:
            found = "nothing" if array is None else list(array.shape)
            raise InputError(
                f"params: {'.'.join(leaf.path)} is {found}, expected {list(leaf.shape)}; pass the model's spec"
            )
        if str(array.dtype) not in DTYPES:
            raise InputError(f"params: {'.'.join(leaf.path)} is {array.dtype}, expected one of {', '.join(DTYPES)}")
        arrays |= {name: (array, i if leaf.stacked else None) for i, name in enumerate(leaf.names)}
    shared = any(not array.is_fully_addressable for array, _ in arrays.values() if isinstance(array, jax.Array))

    def read_part(name: str, part: Part) -> np.ndarray:
        array, layer = arrays[name]
        index = part if layer is None else (slice(layer, layer + 1), *part)
        return host_part(array, index).reshape(part_shape(part))

    def own_parts(name: str) -> list[Part]:
        array, layer = arrays[name]
        if shared and jax.process_index() > 0 and _is_local(array):
            return []
        held = _held_parts(array)
        if layer is None:
            return held
        return [part[1:] for part in held if part[0].start <= layer < part[0].stop]

    shapes = {name: tuple(array.shape if layer is None else array.shape[1:]) for name, (array, layer) in arrays.items()}
    dtypes = {name: str(array.dtype) for name, (array, _) in arrays.items()}
    return TensorSource(path, config_from_spec(spec, "float32"), shapes, dtypes, read_part, own_parts, shared)


def _is_local(array: Any) -> bool:
    """Whether every process has its own copy of an array like this."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _held_parts(array: Any) -> list[Part]:
    """The parts of an array whose first replica this process holds."""
    if not isinstance(array, jax.Array):
        return [whole(array.shape)]
    return [normalized(shard.index, array.shape) for shard in array.addressable_shards if shard.replica_id == 0]


def host_part(array: Any, part: Part, small: bool = False) -> np.ndarray:
    """A part of a numpy array, or of a jax array if it lies within one shard, on the host.

    Args:
        array: numpy or jax array.
        part: a slice per axis.
        small: whether the whole shard may be copied to the host and stay there; else it is sliced on its device.

    Raises:
        ValueError: no device of this process holds all of it.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array[part])
    for shard in array.addressable_shards:
        held = normalized(shard.index, array.shape)
        if all(have.start <= want.start and want.stop <= have.stop for have, want in zip(held, part, strict=True)):
            starts = [want.start - have.start for have, want in zip(held, part, strict=True)]
            lengths = part_shape(part)
            if small:
                within = tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))
                return np.asarray(shard.data)[within]
            # Sliced on the device: a numpy view of a jax array copies all of it to the host, where it stays. Under the
            # caller's mesh jax would refuse an array on one device.
            with jax.set_mesh(Mesh(np.array([shard.device]), ("device",))):
                return np.asarray(jax.lax.dynamic_slice(shard.data, starts, lengths))
    raise ValueError(f"no device of this process holds {part} of an array {array.shape}")
