"""Parts of an array in a file: which bytes they are, and reading and writing those bytes and no others.

A part is a slice per axis of a row-major array, `[O,I]` or `[O]`: whole rows are one run of bytes, columns one run per
row. Files are read and written at offsets, not memory-mapped: the system reads a mapped file, and on a disk shared by
several hosts writes it back, in whole pages, which include the neighbours' bytes.
"""

import itertools
import math
import os
from collections.abc import Iterator

import numpy as np

Part = tuple[slice, ...]
# How much of a tensor a check, count or checksum holds in memory at a time: small beside a large embedding.
_BLOCK_BYTES = 1 << 24


def whole(shape: tuple[int, ...]) -> Part:
    """The part that covers a whole array."""
    return normalized((), shape)


def normalized(index: tuple[slice, ...], shape: tuple[int, ...]) -> Part:
    """The part meant by an index of slices, as jax gives it: open ends and omitted axes cover the whole axis."""
    full = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(slice(*along.indices(length)[:2]) for along, length in zip(full, shape, strict=True))


def part_shape(part: Part) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(along.stop - along.start for along in part)


def row_blocks(part: Part, row_bytes: int, max_bytes: int = _BLOCK_BYTES) -> Iterator[Part]:
    """Cuts a part into blocks of whole rows, each of at most `max_bytes` (or one row), in order.

    Args:
        part: what to cut.
        row_bytes: bytes of one row of the part.
        max_bytes: largest size of a block in bytes.
    """
    rows = max(1, max_bytes // max(1, row_bytes))
    for start in range(part[0].start, part[0].stop, rows):
        yield (slice(start, min(start + rows, part[0].stop)), *part[1:])


def read_part(path: str | os.PathLike[str], start: int, out: np.ndarray, shape: tuple[int, ...], part: Part) -> None:
    """Reads one part of an array in a file.

    Args:
        path: the file.
        start: byte of the file where the array begins.
        out: filled with the part: its shape, the array's dtype, contiguous.
        shape: shape of the whole array.
        part: what to read.

    Raises:
        EOFError: the file is too short.
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        for offset, run in _runs(shape, part, out):
            done = 0
            while done < len(run):
                count = os.preadv(file.fileno(), [run[done:]], start + offset + done)
                if count == 0:
                    size = os.fstat(file.fileno()).st_size
                    raise EOFError(f"the file has {size} bytes, expected {start + offset + len(run)} or more")
                done += count


def write_part(descriptor: int, start: int, values: np.ndarray, shape: tuple[int, ...], part: Part) -> None:
    """Writes one part of an array into a file that already has its full size.

    Args:
        descriptor: the open file.
        start: byte of the file where the array begins.
        values: the part's entries, contiguous, in the array's dtype.
        shape: shape of the whole array.
        part: what to write.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    for offset, run in _runs(shape, part, values):
        done = 0
        while done < len(run):
            done += os.pwrite(descriptor, run[done:], start + offset + done)


def _runs(shape: tuple[int, ...], part: Part, values: np.ndarray) -> Iterator[tuple[int, memoryview]]:
    """Every contiguous run of a part: its offset in the whole array in bytes, and its bytes in `values`."""
    lengths = part_shape(part)
    # Everything after the last axis that is cut is contiguous.
    last = max((axis for axis in range(len(shape)) if lengths[axis] != shape[axis]), default=0)
    strides = [math.prod(shape[axis + 1 :]) * values.itemsize for axis in range(last + 1)]
    data = values.reshape(-1).view(np.uint8).data
    length = math.prod(lengths[last:]) * values.itemsize
    outer = itertools.product(*(range(along.start, along.stop) for along in part[:last]))
    for number, place in enumerate(outer):
        offset = sum(index * stride for index, stride in zip((*place, part[last].start), strides, strict=True))
        yield offset, data[number * length : (number + 1) * length]
