"""Whole numbers from products of floats."""

import math


def round_up(number: float) -> int:
    """The least whole number that is not below `number` (0 or more), but for what its own rounding has added to it.

    Products such as 0.07 * 100 and 1.1 * 100 are a little above the whole number that is meant.
    """
    return math.ceil(number * (1 - 1e-12))
