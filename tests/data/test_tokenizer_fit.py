"""A tokenizer may know fewer tokens than the embedding has rows, never more."""

from typing import Any

import pytest

from efx_jax.data.tokenizer import check_vocabulary
from efx_jax.errors import InputError


class Vocabulary:
    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in self.ids}


def test_an_id_beyond_the_embedding_is_refused() -> None:
    fitting: Any = Vocabulary(0, 22)
    check_vocabulary(fitting, 23)
    beyond: Any = Vocabulary(0, 23)
    with pytest.raises(InputError, match="token id 23, but the embedding has 23 rows"):
        check_vocabulary(beyond, 23)
