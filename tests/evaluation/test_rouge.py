"""ROUGE equals rouge-score's, row by row, with words as their stems."""

import numpy as np
import pytest

from efx_jax.errors import InputError
from efx_jax.evaluation.rouge import ROUGE, rouge_scores

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")


def random_texts(seed: int, rows: int) -> list[str]:
    generator = np.random.default_rng(seed)
    words = np.asarray(["bill", "bills", "amend", "amended", "tax", "the", "of", "act", "Act", "1934"])
    return [" ".join(generator.choice(words, generator.integers(0, 12))) for _ in range(rows)]


def test_every_row_equals_rouge_score_on_random_texts() -> None:
    texts, references = random_texts(0, 40), random_texts(1, 40)
    for stemmer in (True, False):
        scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=stemmer)
        for row, text, reference in zip(rouge_scores(texts, references, stemmer), texts, references, strict=True):
            expected = scorer.score(reference, text)
            assert row.tolist() == [expected[name].fmeasure for name in ROUGE]


def test_words_are_stemmed_unless_asked_otherwise() -> None:
    assert rouge_scores(["studies running"], ["study run"])[0, 0] == 1.0
    assert rouge_scores(["studies running"], ["study run"], stemmer=False)[0, 0] == 0.0


def test_an_empty_text_scores_nothing() -> None:
    assert rouge_scores([""], ["a summary"]).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("texts", [["今天天气很好", "2 型糖尿病", "COPD"], ["Привет мир", "?!"]])
def test_answers_in_letters_that_rouge_does_not_know_are_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="reads Latin letters only, and most of the answers wanted have others"):
        rouge_scores(texts, texts)


def test_some_other_letters_are_scored_as_rouge_does() -> None:
    texts = ["β receptor blockers", "?", ""]
    assert rouge_scores(texts, texts).tolist() == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
