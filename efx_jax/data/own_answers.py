"""The answers to choose from in a user's own rows, and what looks like a mistake in them."""

import difflib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence

from efx_jax.data.frames import Format
from efx_jax.data.prompts import Example
from efx_jax.errors import InputError

MOST_LABELS = 100  # more different answers than that are free text

# With more than `_FEW_LABELS` distinct responses, a larger share of distinct ones than this means free text.
_FEW_LABELS = 10
_ALL_DIFFERENT = 0.8


def distinct_answers(test: Sequence[Example], source: str) -> tuple[str, ...]:
    """The distinct responses of test rows, sorted. Warns of likely mistakes, since they count as answers too.

    Args:
        test: the rows.
        source: their file, for messages.

    Raises:
        InputError: responses that look identical, or too many different ones.
    """
    labels = tuple(sorted({example.response for example in test}))
    spellings = {_composed(label): label for label in labels}
    twice = next((label for label in labels if spellings[_composed(label)] != label), None)
    if twice is not None:
        raise InputError(
            f"{source}: responses {twice!r} and {spellings[_composed(twice)]!r} differ in blanks or in the coding of "
            "accents alone; expected one spelling of every answer; repair the rows"
        )
    if len(labels) > MOST_LABELS or (len(labels) > _FEW_LABELS and len(labels) > _ALL_DIFFERENT * len(test)):
        raise InputError(
            f"{source}: {len(labels)} distinct responses in {len(test)} rows; expected at most {MOST_LABELS} "
            "answers to choose from, most of them more than once; for free text set data.new_tokens"
        )
    if len(labels) == 1:
        warnings.warn(f"{source}: every test row has the answer {labels[0]!r}, so every model is right", stacklevel=2)
    warn_of_slips(test)
    return labels


def warn_of_slips(examples: Sequence[Example]) -> None:
    """Warns of answers that differ only in case, and of answers of a single row that are spelled much like others."""
    answers = [example.response.strip() for example in examples]
    counts = Counter(answers)
    if len(counts) > MOST_LABELS:
        return
    common = [answer for answer, count in counts.items() if count > 1]
    for answer, count in counts.items():
        alike = [other for other in counts if other != answer and other.casefold() == answer.casefold()]
        if count == 1:
            alike += difflib.get_close_matches(answer, common, n=1, cutoff=0.7)
        if alike and (count, answer) < (counts[alike[0]], alike[0]):
            warnings.warn(
                f"{examples[answers.index(answer)].origin}: the answer {answer!r} ({count} of {len(answers)} rows) "
                f"counts as a different answer from {alike[0]!r} ({counts[alike[0]]} rows); correct it if it is a typo",
                stacklevel=2,
            )


def warn_of_learned(
    learned: Sequence[Example], labels: Sequence[str], name: str, style: Format, is_own: bool = False
) -> None:
    """Warns of training answers that are not among those to choose from: `warn_of_unasked` and `warn_of_blanks`.

    Args:
        style: the format of the run; a frame drops the blanks before an answer.

    The other arguments are those of `warn_of_unasked`.
    """
    warn_of_unasked(learned, labels, name, is_own)
    if style == "plain":
        warn_of_blanks(learned, labels, name)


def warn_of_unasked(learned: Sequence[Example], labels: Sequence[str], name: str, is_own: bool = False) -> None:
    """Warns of training rows whose answer no test row has, so that it can never be chosen, and names the first.

    Args:
        learned: the training rows.
        labels: the answers to choose from; () if there are none.
        name: the task, for messages.
        is_own: whether the rows are known to belong to the task. If not, and none of them has one of its answers
            in upper or lower case, they may belong to another task, and nothing is warned of.
    """
    known = {label.strip() for label in labels}
    unasked = [example for example in learned if example.response.strip() not in known]
    spellings = {label.casefold() for label in known}
    is_slip = len(unasked) < len(learned) or any(each.response.strip().casefold() in spellings for each in unasked)
    if labels and unasked and (is_slip or is_own):
        warnings.warn(
            f"{name}: {len(unasked)} of {len(learned)} training rows have an answer that no test row has, so it is not "
            f"among those to choose from; the first is {unasked[0].origin}, {unasked[0].response.strip()!r}",
            stacklevel=2,
        )


def warn_of_blanks(learned: Sequence[Example], labels: Sequence[str], name: str) -> None:
    """Warns of training answers that differ from those to choose from only in blanks, which makes other tokens.

    Args:
        learned: the training rows, in the format that they are trained in.
        labels: the answers to choose from, in the same format.
        name: the task, for messages.
    """
    stripped = {label.strip(): label for label in labels}
    other = [each for each in learned if stripped.get(each.response.strip(), each.response) != each.response]
    if other:
        warnings.warn(
            f"{name}: {len(other)} of {len(learned)} training rows have an answer with other blanks than that of the "
            f"test rows, so what is learned is not what is scored; the first is {other[0].origin}, "
            f"{other[0].response!r}, expected {stripped[other[0].response.strip()]!r}; repair the rows or the template",
            stacklevel=2,
        )


def _composed(label: str) -> str:
    return unicodedata.normalize("NFC", label).strip()
