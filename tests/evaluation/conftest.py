"""Scores and answers of tiny models, whose programs only have to be right."""

from collections.abc import Iterator

import pytest

from tests.quick import quick_compilation


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield
