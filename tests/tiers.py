"""Which cases of a parametrised test run every time, where each takes seconds and all show one thing."""

from collections.abc import Iterable
from typing import Any

import pytest


def few_of(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """All cases, marked `exhaustive` but for the quick ones; a tuple stands for several arguments.

    Args:
        cases: as for `pytest.mark.parametrize`.
        quick: those of them that every run of the tests shall see.
    """

    def param(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=() if case in quick else pytest.mark.exhaustive)

    cases = list(cases)
    assert all(case in cases for case in quick), quick
    return [param(case) for case in cases]
