"""Batches according to the run's settings, sharded over the mesh; every host places only its own rows."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efx_jax.config import Config
from efx_jax.data import batches
from efx_jax.data.batches import ALL_ROWS, ATTENTION_MULTIPLE, Batch, bucketed_batch, make_batch
from efx_jax.data.packing import packed_batch, packed_rows
from efx_jax.data.tokens import Tokenized
from efx_jax.parallel.mesh import mesh_sizes
from efx_jax.parallel.partition import BATCH, axes_size, batch_axes


def epoch_rows(config: Config, train: Sequence[Tokenized]) -> int:
    """Number of rows in one epoch."""
    if config.data.batching == "packing":
        return packed_rows(train, config.seed, config.data.max_length)
    return len(train)


def host_batch(config: Config, train: Sequence[Tokenized], number: int, rows: slice = ALL_ROWS) -> Batch:
    """Some rows of batch `number` as host arrays, see `efx_jax.data.batches.make_batch`."""
    size, length = config.train.batch_size, config.data.max_length
    if config.data.batching == "packing":
        # Short rows of an odd length are left at that length: rounding them up would be most of the padding.
        multiple = ATTENTION_MULTIPLE if length % ATTENTION_MULTIPLE == 0 else None
        return packed_batch(train, config.seed, number, size, length, multiple, rows)
    if config.data.batching == "buckets":
        return bucketed_batch(train, config.seed, number, size, ATTENTION_MULTIPLE, rows)
    return make_batch(train, config.seed, number, size, rows=rows)


def mesh_batch(config: Config, train: Sequence[Tokenized], number: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Batch `number`, split over the mesh's `data` and `fsdp`."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    size = config.train.batch_size
    places = sharding.addressable_devices_indices_map((size,)).values()
    own = [place[0].indices(size) for place in places if place is not None]
    first, stop = min(start for start, _, _ in own), max(end for _, end, _ in own)
    batch = host_batch(config, train, number, slice(first, stop))

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, end, _ = index[0].indices(size)
            return array[start - first : end - first]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}


def distant_batch(number: int, rows: int, size: int) -> int:
    """The number of a batch that shares no rows with batch `number`: half an epoch ahead or behind, in the same epoch.

    (If an epoch ends within one of the two, they may share rows.)

    Args:
        number: of a batch.
        rows: of an epoch.
        size: rows of a batch.
    """
    half = max(1, rows // size // 2)
    is_ahead = number * size % rows + (half + 1) * size <= rows
    return number + half if is_ahead or number < half else number - half


def packed_pass(config: Config) -> tuple[int, int] | None:
    """(B, T) of one device's forward pass if rows are packed, else None."""
    if config.data.batching != "packing":
        return None
    length, sizes = config.data.max_length, mesh_sizes(config.mesh)
    rows = rows_per_pass(config, length)
    return rows // axes_size(batch_axes(rows, sizes), sizes), length


def rows_per_pass(config: Config, length: int) -> int:
    """Sequences of one forward pass over all devices, by `micro_batch` and `micro_tokens`; T is `length`."""
    train = config.train
    rows = train.micro_batch or train.batch_size
    if not train.micro_tokens:
        return rows
    return batches.rows_within_budget(rows, length, train.micro_tokens, axes_size(BATCH, mesh_sizes(config.mesh)))
