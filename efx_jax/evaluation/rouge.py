"""ROUGE of generated text, computed by the package rouge-score."""

from collections.abc import Sequence

import numpy as np

from efx_jax.errors import InputError

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_scores(texts: Sequence[str], references: Sequence[str], stemmer: bool = True) -> np.ndarray:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L of every row (Lin 2004).

    ROUGE-L is over the whole text (not sentence by sentence, which rouge-score calls rougeLsum). Words are reduced to
    Porter stems, as is usual for summaries (option -m of the original program).

    Args:
        texts: the n generated texts.
        references: the n reference texts.
        stemmer: whether words are stemmed.

    Returns:
        float64 [n,3] in [0, 1], columns as in `ROUGE`.

    Raises:
        InputError: as in `check_rouge`.
    """
    check_rouge(references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    rows = [scorer.score(wanted, text) for text, wanted in zip(texts, references, strict=True)]
    return np.asarray([[row[name].fmeasure for name in ROUGE] for row in rows]).reshape(-1, len(ROUGE))


def check_rouge(references: Sequence[str]) -> None:
    """Refuses what cannot be scored, before anything is generated.

    Raises:
        InputError: the package is not installed, or rouge-score ignores most letters of the reference texts: it reads
            only unaccented Latin letters and digits.
    """
    try:
        import rouge_score  # noqa: F401
    except ImportError as error:
        raise InputError('ROUGE needs the package rouge-score; pip install "efx_jax[hf]"') from error
    letters = [letter for text in references for letter in text if letter.isalpha()]
    if 2 * sum(letter.isascii() for letter in letters) < len(letters):
        example = next(text for text in references if any(letter.isalpha() and not letter.isascii() for letter in text))
        raise InputError(
            f"ROUGE reads Latin letters only, and most of the answers wanted have others, such as {example[:40]!r}; "
            "leave this task out of data.test, or measure perplexity on its text (data.text)"
        )
