"""A tokenizer may know fewer tokens than the embedding has rows, never more, and a teacher's must be the same."""

from typing import Any

import pytest

from efx_jax.data.tokenizer import check_same_tokens, check_vocabulary
from efx_jax.errors import InputError


class Vocabulary:
    def __init__(self, *ids: int, **names: int) -> None:
        self.tokens = {str(number): number for number in ids} | names

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


def test_an_id_beyond_the_embedding_is_refused() -> None:
    fitting: Any = Vocabulary(0, 22)
    check_vocabulary(fitting, 23)
    beyond: Any = Vocabulary(0, 23)
    with pytest.raises(InputError, match="token id 23, but the embedding has 23 rows"):
        check_vocabulary(beyond, 23)


def test_another_tokenizer_of_the_same_size_is_refused_and_added_tokens_are_not() -> None:
    model: Any = Vocabulary(0, 1, 2)
    longer: Any = Vocabulary(0, 1, 2, pad=3)
    check_same_tokens(model, longer, "teacher T")
    check_same_tokens(longer, model, "teacher T")
    other: Any = Vocabulary(0, 1, two=2)
    with pytest.raises(InputError, match="^teacher T: token 2 is 'two', expected '2' as in the model's tokenizer; "):
        check_same_tokens(model, other, "teacher T")
