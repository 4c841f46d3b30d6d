"""A matrix with zeros as a bitmask and the entries that are kept, and back, bit for bit.

The layout is that of compressed-tensors up to 0.14 (github.com/vllm-project/compressed-tensors, `sparse-bitmask`). For
`P.weight` `[O,I]` it stores

```
P.compressed    [nnz]           dtype of the weight: the kept entries, row by row
P.bitmask       [O, ceil(I/8)]  uint8: bit b of byte j is set if input 8 j + b is kept
P.shape         [2]             int64: O, I
P.row_offsets   [O]             int64: where each row begins in `compressed`
```

with one difference: an entry is dropped only if all its bits are zero. -0.0 and every NaN are kept, so nothing is lost.
"""

import numpy as np

SUFFIX = ".weight"
COMPRESSED, BITMASK, SHAPE, ROW_OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"


def bits_of(values: np.ndarray) -> np.ndarray:
    """The bit patterns of an array as unsigned integers of the same size; a contiguous array is not copied."""
    return np.ascontiguousarray(values).view(np.dtype(f"u{values.dtype.itemsize}"))


def pack_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into their bitmask and the kept entries.

    Args:
        rows: `[O,I]`, any dtype of 2 or 4 bytes.

    Returns:
        bitmask uint8 `[O,ceil(I/8)]`, and the entries with any bit set, row by row, in the dtype of `rows`.
    """
    bits = bits_of(rows)
    stays = bits != 0
    return np.packbits(stays, axis=1, bitorder="little"), bits[stays].view(rows.dtype)


def expand_rows(bitmask: np.ndarray, compressed: np.ndarray, in_dim: int) -> np.ndarray:
    """Restores the rows that `pack_rows` has split.

    Args:
        bitmask: uint8 `[O,ceil(I/8)]`.
        compressed: its entries.
        in_dim: I.

    Returns:
        `[O,I]` in the dtype of `compressed`; dropped entries are +0.

    Raises:
        ValueError: the number of set bits is not that of the entries, or a bit beyond I is set.
    """
    if int(count_bits(bitmask).sum()) != compressed.size:
        raise ValueError(f"the bitmask has {int(count_bits(bitmask).sum())} bits for {compressed.size} entries")
    if in_dim % 8 and (bitmask[:, -1] >> (in_dim % 8)).any():
        raise ValueError(f"the bitmask has a bit beyond its {in_dim} columns")
    stays = unpack_bits(bitmask, in_dim)
    bits = bits_of(compressed)
    rows = np.zeros(stays.shape, bits.dtype)
    rows[stays] = bits
    return rows.view(compressed.dtype)


def unpack_bits(bitmask: np.ndarray, in_dim: int) -> np.ndarray:
    """uint8 `[O,ceil(I/8)]` -> bool `[O,I]`."""
    return np.unpackbits(bitmask, axis=1, count=in_dim, bitorder="little").view(np.bool_)


def count_bits(bitmask: np.ndarray) -> np.ndarray:
    """The number of bits set in every row of uint8 `[O,J]`: int64 `[O]`."""
    return np.bitwise_count(bitmask).sum(axis=1, dtype=np.int64)


def packed_bytes(out_dim: int, in_dim: int, entries: int, itemsize: int) -> int:
    """Bytes of the four arrays of a matrix `[O,I]` of which `entries` are kept."""
    return entries * itemsize + out_dim * -(-in_dim // 8) + 8 * out_dim + 16
