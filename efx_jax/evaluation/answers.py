"""Reading one of a task's answers out of generated text."""

import re
from collections.abc import Sequence

import numpy as np

from efx_jax.errors import InputError


def parse_answers(texts: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The label that each generated text gives.

    The rule: in the first non-blank line, the label that begins first; if several begin at the same place, the longest.
    A label must match whole words, regardless of case and of the width of blanks: "no" is not in "not", and "1" is in
    neither "10" nor "1.5". Meaning is ignored: "not likely yes" reads as "yes".

    Args:
        texts: the n generated texts.
        labels: the answers; surrounding blanks do not matter.

    Returns:
        int [n]: the number of the label, -1 if the line holds none.

    Raises:
        InputError: labels that `check_readable` refuses.
    """
    check_readable(labels)
    longest_first = sorted(range(len(labels)), key=lambda number: -len(_words(labels[number])))
    # If several alternatives match at one place, a regular expression takes the first.
    choices = re.compile("|".join(f"({_spelling(labels[number])})" for number in longest_first), re.IGNORECASE)
    found = (choices.search(_first_line(text)) for text in texts)
    return np.asarray([longest_first[match.lastindex - 1] if match and match.lastindex else -1 for match in found], int)


def check_readable(labels: Sequence[str]) -> None:
    """Refuses labels that generated text cannot tell apart.

    Raises:
        InputError: two labels that differ only in case and blanks.
    """
    seen: dict[str, str] = {}
    for label in labels:
        earlier = seen.setdefault(_words(label).casefold(), label)
        if earlier is not label:
            raise InputError(
                f"answers {earlier.strip()!r} and {label.strip()!r} look the same in generated text; take the protocol "
                "likelihood, or change the answers"
            )


def _words(label: str) -> str:
    return " ".join(label.split())


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _spelling(label: str) -> str:
    words = label.split()
    before = r"(?<!\w)(?<!\d[.,])" if words[0][0].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if words[-1][-1].isdigit() else r"(?!\w)"
    return before + r"\s+".join(map(re.escape, words)) + after
