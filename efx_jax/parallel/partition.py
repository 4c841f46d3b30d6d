"""How every array is sharded over the mesh, by its name.

`fsdp` splits the output rows of every matrix, `tensor` the outputs of q, k, v, gate and up and the inputs of o and
down, both together the vocabulary; the batch is split over `data` and `fsdp`. Adapters, masks, optimizer moments and
the moving average's state are sharded like their matrix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.parallel.mesh import active_mesh

Axes = tuple[str, ...]
BATCH: Axes = ("data", "fsdp")
VOCABULARY: Axes = ("tensor", "fsdp")


class LinearAxes(NamedTuple):
    """Mesh axes of one linear: of its output rows O, of its inputs I, and of the batch that it is applied to."""

    rows: Axes
    columns: Axes
    batch: Axes = BATCH


def linear_axes(name: str, batch: Axes = BATCH) -> LinearAxes:
    """How linear `name` (`q_proj` ... `down_proj`) is sharded over the mesh."""
    if name in ("o_proj", "down_proj"):
        return LinearAxes(rows=("fsdp",), columns=("tensor",), batch=batch)
    return LinearAxes(rows=("tensor", "fsdp"), columns=(), batch=batch)


def axes_size(axes: Axes, sizes: Mapping[str, int]) -> int:
    """Number of devices along several mesh axes together."""
    return math.prod(sizes[axis] for axis in axes)


def batch_axes(rows: int, sizes: Mapping[str, int]) -> Axes:
    """The axes that a batch of `rows` sequences is split over: as many of `data` and `fsdp` as divide it."""
    for axes in (BATCH, BATCH[:1], BATCH[1:]):
        if rows % axes_size(axes, sizes) == 0:
            return axes
    return ()


def active_batch_axes(rows: int) -> Axes | None:
    """`batch_axes` on the active mesh; None without one."""
    mesh = active_mesh()
    return None if mesh is None else batch_axes(rows, mesh.shape)


def split_over(rows: int) -> int:
    """How many devices of the active mesh a batch of `rows` sequences is split over; 1 without a mesh."""
    mesh = active_mesh()
    return 1 if mesh is None else axes_size(batch_axes(rows, mesh.shape), mesh.shape)


def divisible_rows(rows: int) -> int:
    """`rows` rounded up to what the active mesh's devices divide; otherwise each of them would compute all rows."""
    mesh = active_mesh()
    devices = 1 if mesh is None else axes_size(BATCH, mesh.shape)
    return -(-rows // devices) * devices


def partition(path: tuple[str, ...], ndim: int) -> PartitionSpec:
    """The partition of one array of the parameter tree, of adapters, of masks or of `PruneState`.

    Args:
        path: names from the root of its tree, such as ("layers", "q_proj"), ("lora_a", "q_proj") or
            ("snapshots", "lora_b/q_proj").
        ndim: its number of axes; those before `[O,I]` and the like (L, events) are never split.
    """
    *groups, leaf = [part for name in path for part in name.split("/")]
    kind = groups[-1] if groups else ""
    if leaf in ("embed_tokens", "lm_head"):
        return PartitionSpec(VOCABULARY, None)
    if not leaf.endswith(("_proj", "_proj_bias")):
        return PartitionSpec()
    axes = linear_axes(leaf.removesuffix("_bias"))
    if leaf.endswith("_bias"):
        # A bias is added after the rows have been gathered over fsdp.
        own: tuple[Any, ...] = (None if axes.columns else "tensor",)
    elif kind == "lora_a":
        own = (None, axes.columns)
    elif kind == "lora_b":
        own = (axes.rows, None)
    elif kind == "reach":
        own = (axes.rows,)
    else:
        own = (axes.rows, axes.columns)
    return PartitionSpec(*(None,) * (ndim - len(own)), *(part or None for part in own))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """`NamedSharding` for every leaf of a tree of arrays, `ShapeDtypeStruct`s or shape tuples; see `partition`."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        ndim = len(leaf) if isinstance(leaf, tuple) else leaf.ndim
        return NamedSharding(mesh, partition(_names(path), ndim))

    return jax.tree_util.tree_map_with_path(sharding, tree, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    """Whether a node of a tree is a shape; optimizer states are tuples too."""
    return type(node) is tuple and bool(node) and all(isinstance(size, int) for size in node)


def placed_shapes(mesh: Mesh, tree: Any) -> Any:
    """The shapes and dtypes of a tree of arrays or `ShapeDtypeStruct`s, with the sharding that `partition` gives."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings(mesh, tree),
    )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Keys of dictionaries and names of struct fields along a path; indices into lists and tuples are left out."""
    keys = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return tuple(key for key in keys if isinstance(key, str))


def constrain(array: jax.Array, *axes: Any) -> jax.Array:
    """`array` sharded by mesh axes per dimension (none given: replicated); unchanged without an active mesh."""
    return array if active_mesh() is None else jax.lax.with_sharding_constraint(array, PartitionSpec(*axes))


def constrain_tree(tree: Any) -> Any:
    """Every array of a tree constrained to its `partition`; unchanged without an active mesh."""
    if active_mesh() is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.with_sharding_constraint(leaf, partition(_names(path), leaf.ndim)), tree
    )


def split_rows(function: Callable[..., Any], name: str, rows: Sequence[Any], whole: Sequence[Any]) -> Any:
    """`function(*rows, *whole)`, with the rows distributed over all devices of the active mesh.

    Args:
        function: maps trees of arrays `[O,...]` and whole arrays to a tree of arrays `[O,...]`, row by row.
        name: the linear that the matrices `[O,I]` belong to, or one that is sharded like it.
        rows: trees of matrices `[O,I]`.
        whole: trees of arrays that every row needs whole.

    Returns:
        The function's result; a result `[O,I]` is sharded like the matrix, one `[O,R]` with fewer columns like B.
    """
    mesh = active_mesh()
    if mesh is None:
        return function(*rows, *whole)
    axes = linear_axes(name)
    matrix, tall = PartitionSpec(axes.rows, axes.columns or None), PartitionSpec(axes.rows, None)
    matrices = jax.tree.leaves(rows)
    in_dim = matrices[0].shape[1]
    parts = axes_size(("tensor", *axes.rows) if axes.columns else axes.rows, mesh.shape)
    # Data-parallel replicas share the rows too, if these divide evenly.
    over_data = all(leaf.shape[0] % (parts * mesh.shape["data"]) == 0 for leaf in matrices)

    def share(part: jax.Array) -> jax.Array:
        """This device's part of a matrix -> fewer rows, each of them whole."""
        if axes.columns:
            part = jax.lax.all_to_all(part, axes.columns, split_axis=0, concat_axis=1, tiled=True)
        if not over_data:
            return part
        own = part.shape[0] // mesh.shape["data"]
        return jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index("data") * own, own)

    def unite(part: jax.Array) -> jax.Array:
        """The inverse; if the matrix's columns are split, every device along `tensor` gets all rows of B."""
        if over_data:
            part = jax.lax.all_gather(part, "data", axis=0, tiled=True)
        if not axes.columns:
            return part
        if part.shape[1] == in_dim:
            return jax.lax.all_to_all(part, axes.columns, split_axis=1, concat_axis=0, tiled=True)
        return jax.lax.all_gather(part, axes.columns, axis=0, tiled=True)

    def local(rows: Any, whole: Any) -> Any:
        return jax.tree.map(unite, function(*jax.tree.map(share, rows), *whole))

    results = jax.eval_shape(function, *rows, *whole)
    out_specs = jax.tree.map(lambda leaf: matrix if leaf.shape[1] == in_dim else tall, results)
    in_specs = (jax.tree.map(lambda _: matrix, tuple(rows)), jax.tree.map(lambda _: PartitionSpec(), tuple(whole)))
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(tuple(rows), tuple(whole))


def to_host(array: jax.Array) -> jax.Array:
    """The matrix `[O,I]` moved to the hosts' memory, where it takes no device memory; replicas share out its rows."""
    shared = _shared_out(array.sharding, array.shape[0])
    return jax.device_put(jax.device_put(array, shared), shared.with_memory_kind("pinned_host"))


def to_device(array: jax.Array) -> jax.Array:
    """The inverse of `to_host`."""
    array = jax.device_put(array, array.sharding.with_memory_kind("device"))
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return array
    rows, *columns = sharding.spec
    own = tuple(axis for axis in _axes(rows) if axis != "data")
    return jax.device_put(array, NamedSharding(sharding.mesh, PartitionSpec(own or None, *columns)))


def block_on_host(stacked: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape and sharding of `to_host` of a float32 array `[O,I]` that is sharded like a block of `stacked [L,O,I]`."""
    sharding = stacked.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    sharding = _shared_out(sharding, stacked.shape[1]).with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(stacked.shape[1:], jax.numpy.float32, sharding=sharding)


def _shared_out(sharding: Any, rows: int) -> Any:
    """The sharding of a matrix of `rows` rows with these split over `data` too, if they divide evenly."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    first, *columns = (*sharding.spec, None, None)[:2]
    axes = (*_axes(first), "data")
    if rows % axes_size(axes, sharding.mesh.shape):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(axes, *columns))


def _axes(part: Any) -> Axes:
    """The mesh axes of one dimension of a `PartitionSpec`."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
