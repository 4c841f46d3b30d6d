"""Checkpoint to parameter tree: read leaf by leaf, checked, and put on one device or sharded over many."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from efx_jax.errors import InputError
from efx_jax.model.spec import ModelSpec, param_shapes
from efx_jax.parallel.partition import tree_shardings
from efx_jax.weights.byte_ranges import Part, normalized, part_shape, row_blocks, whole
from efx_jax.weights.source import (
    DTYPES,
    EMBEDDING,
    Leaf,
    TensorSource,
    cast,
    check_names_and_shapes,
    check_tied_head,
    leaf_dtype,
    leaves,
)


def assemble(source: TensorSource, spec: ModelSpec, dtype: str | None, mesh: Mesh | None = None) -> dict[str, Any]:
    """Reads a checkpoint into the parameter tree of `param_shapes(spec)`.

    Host memory above the tree itself stays within two copies of its largest leaf: tensors are read one by one into
    one leaf at a time. On a mesh a process reads only what its devices hold, one shard at a time, and a shard that
    several of them hold only once.

    Args:
        source: the checkpoint.
        spec: its model.
        dtype: "float32", "bfloat16", "float16", or None to keep each leaf's own (a leaf whose layers differ in dtype
            becomes float32, which holds all of them exactly).
        mesh: the devices over which the tree is sharded as in `parallel.partition`; None: the default device.

    Returns:
        The tree, jax arrays.

    Raises:
        InputError: a missing, unknown or wrongly shaped tensor, NaN or Inf, a tied head that differs, or a mesh that
            does not divide a matrix.
    """
    check_names_and_shapes(source, spec)
    tensors = source if dtype is None else cast(source, dtype)
    layout = None if mesh is None else _layout(mesh, spec)
    # Only the parts of the embedding that this process reads anyway are compared.
    shape = source.shapes[EMBEDDING]
    parts = None if layout is None else [part for part, _ in _local_parts(layout["embed_tokens",], shape)]
    check_tied_head(source, spec, parts)
    params: dict[str, Any] = {"layers": {}}
    for leaf in leaves(spec):
        branch = params["layers"] if leaf.stacked else params
        branch[leaf.path[-1]] = _load_leaf(tensors, leaf) if layout is None else _load_shards(tensors, leaf, layout)
    return params


def tree_bytes(source: TensorSource, spec: ModelSpec) -> int:
    """Size of the tree that `assemble(source, spec, None)` gives, in bytes.

    Raises:
        InputError: a missing, unknown or wrongly shaped tensor.
    """
    check_names_and_shapes(source, spec)
    return sum(math.prod(leaf.shape) * DTYPES[leaf_dtype(source, leaf)].itemsize for leaf in leaves(spec))


Layout = dict[tuple[str, ...], Sharding]


def _layout(mesh: Mesh, spec: ModelSpec) -> Layout:
    """The sharding of every leaf by its path."""
    shardings = tree_shardings(mesh, param_shapes(spec))
    layout = {}
    for leaf in leaves(spec):
        branch = shardings["layers"] if leaf.stacked else shardings
        layout[leaf.path] = branch[leaf.path[-1]]
        try:
            layout[leaf.path].shard_shape(leaf.shape)
        except ValueError as error:
            raise InputError(
                f"mesh: {'.'.join(leaf.path)} {list(leaf.shape)} does not divide into equal parts of "
                f"{layout[leaf.path].spec} on {dict(mesh.shape)}; choose a mesh that divides the model"
            ) from error
    return layout


def _load_leaf(source: TensorSource, leaf: Leaf) -> jax.Array:
    return jax.block_until_ready(jax.device_put(_read_leaf(source, leaf, whole(leaf.shape))))


def _load_shards(source: TensorSource, leaf: Leaf, layout: Layout) -> jax.Array:
    shards = []
    for part, devices in _local_parts(layout[leaf.path], leaf.shape):
        values = _read_leaf(source, leaf, part)
        shards += jax.block_until_ready([jax.device_put(values, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, layout[leaf.path], shards)


def _local_parts(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[Part, list[jax.Device]]]:
    """The distinct parts of an array that this process holds, each with the local devices that hold it."""
    found: dict[tuple[int, ...], tuple[Part, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = normalized(index or (), shape)
        # Slices are not hashable before Python 3.12.
        found.setdefault(tuple(along.start for along in part), (part, []))[1].append(device)
    return list(found.values())


def _read_leaf(source: TensorSource, leaf: Leaf, part: Part) -> np.ndarray:
    """One part of a leaf; a stacked one is filled layer by layer."""
    if not leaf.stacked:
        return _read_finite(source, leaf.names[0], part)
    stacked = np.empty(part_shape(part), DTYPES[leaf_dtype(source, leaf)])
    for layer, name in enumerate(leaf.names):
        stacked[layer] = _read_finite(source, name, part[1:])
    return stacked


def _read_finite(source: TensorSource, name: str, part: Part) -> np.ndarray:
    """Reads one part of a tensor and refuses NaN and Inf."""
    values = source.read_part(name, part)
    row_bytes = values.nbytes // len(values)
    for block in row_blocks(whole(values.shape), row_bytes):
        finite = np.isfinite(values[block])
        if not finite.all():
            index = np.argwhere(~finite)[0] + [along.start for along in block]
            place = [int(i) + along.start for i, along in zip(index, part, strict=True)]
            raise InputError(
                f"{source.path}: tensor {name} holds {values[tuple(index)]} at {place}; expected finite numbers; "
                "get an intact checkpoint"
            )
    return values
