import itertools

import ml_dtypes
import numpy as np
import pytest

from efx_jax.weights.bitmask import expand_rows, pack_rows, packed_bytes

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHAPES = [(1, 1), (1, 8), (3, 7), (5, 9), (2, 16), (4, 17), (7, 64), (6, 95), (1, 1000)]


def _random(shape: tuple[int, int], dtype: str, share: float) -> np.ndarray:
    """Random bit patterns, so infinities, NaNs of all kinds, subnormal numbers and -0.0 too, and zeros."""
    size = np.dtype(DTYPES[dtype]).itemsize
    rng = np.random.default_rng(shape[1])
    bits = rng.integers(0, 1 << 8 * size, shape, dtype=f"u{size}")
    bits[rng.random(shape) < share] = 0
    bits.flat[::11] = 1 << (8 * size - 1)
    return bits.view(DTYPES[dtype])


def _expected(rows: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """Bitmask and the bits of the entries that stay, entry by entry in Python."""
    patterns = rows.view(f"u{rows.dtype.itemsize}").tolist()
    mask = [
        [
            sum((row[i] != 0) << (i - start) for i in range(start, min(start + 8, len(row))))
            for start in range(0, len(row), 8)
        ]
        for row in patterns
    ]
    return mask, [pattern for row in patterns for pattern in row if pattern]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_that_of_the_layout_and_loses_no_bit(dtype: str) -> None:
    for shape, share in itertools.product(SHAPES, (0.0, 0.5, 0.9, 1.0)):
        rows = _random(shape, dtype, share)
        bitmask, compressed = pack_rows(rows)
        mask, kept = _expected(rows)
        assert bitmask.dtype == np.uint8 and bitmask.tolist() == mask
        assert compressed.dtype == rows.dtype
        assert compressed.view(f"u{rows.dtype.itemsize}").tolist() == kept
        found = expand_rows(bitmask, compressed, shape[1])
        assert (found.dtype, found.shape) == (rows.dtype, rows.shape)
        assert found.tobytes() == rows.tobytes()
        assert packed_bytes(*shape, len(kept), rows.dtype.itemsize) == (
            compressed.nbytes + bitmask.nbytes + 8 * shape[0] + 16
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_and_nan_are_stored_and_zero_is_not(dtype: str) -> None:
    rows = np.array([[0.0, -0.0, np.nan, 0.0, 1.0]], DTYPES[dtype])
    bitmask, compressed = pack_rows(rows)
    assert bitmask.tolist() == [[0b10110]]
    assert np.signbit(compressed[0]) and np.isnan(compressed[1]) and compressed[2] == 1


def test_bits_that_do_not_fit_the_entries_are_refused() -> None:
    bitmask, compressed = pack_rows(np.array([[0, 1, 2], [3, 0, 0]], np.float32))
    with pytest.raises(ValueError, match="3 bits for 2 entries"):
        expand_rows(bitmask, compressed[:2], 3)
    moved = bitmask.copy()
    moved[1, 0] = 1 << 3
    with pytest.raises(ValueError, match="beyond its 3 columns"):
        expand_rows(moved, compressed, 3)
