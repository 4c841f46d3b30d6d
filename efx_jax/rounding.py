"""Whole numbers from products of floats."""

import math


def round_up(number: float) -> int:
    """The smallest whole number not below `number` (0 or more), ignoring what float rounding has added to it.

    Products such as 0.07 * 100 and 1.1 * 100 are slightly above the whole number that is meant.
    """
    return math.ceil(number * (1 - 1e-12))
