"""Shares of whole numbers, rounded up."""

import pytest

from efx_jax.rounding import round_up


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0.0, 0), (7.0, 7), (0.07 * 100, 7), (1.1 * 100 / 10, 11), (7.001, 8), (1e-6, 1), (0.1 * 3 * 1e8, 30_000_000)],
)
def test_what_a_product_has_too_much_counts_for_nothing(number: float, expected: int) -> None:
    assert round_up(number) == expected


def test_a_real_fraction_of_a_large_number_counts() -> None:
    assert round_up(1e9 + 1 / 16) == 1_000_000_001
