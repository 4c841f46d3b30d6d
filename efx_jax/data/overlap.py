"""Rows that share what identifies them: found by their texts, whatever their case, punctuation and blanks."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from efx_jax.data.prompts import Example

# Not the signs <, >, =, + and ~, nor what \W has too, the vowel signs of many scripts.
_INSIGNIFICANT = re.compile(r"[\s!-*,-/:;?@\[-`{-}\u00a1\u00ab\u00b7\u00bb\u00bf\u2000-\u206f\u3000-\u303f]+")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
# What tells one formula from another: a sign between numbers, a minus or a dollar before one, the sharp of C#.
_SIGN = re.compile(r"(?<=\d)\s*[-*/%^](?=\s*\d)|(?<!\w)[-$](?=\d)|(?<=\w)#")
# Where one number ends and the next begins; the comma of 1,000 does neither.
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)[,;:]*\s[\s,;:]*(?=\d)")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"))


def fingerprint(*texts: str) -> str:
    """A short name of some texts that does not depend on case, punctuation and blanks, unless there is nothing else.

    Signs of comparison and of arithmetic, decimal points and the places where numbers part count: they tell questions
    on doses and formulas apart. One character counts as another that is the same to Unicode (NFKC).
    """
    alike = [unicodedata.normalize("NFKC", text).casefold().translate(_DASHES) for text in texts]
    # Signs become letters that no text has.
    pointed = [_DECIMAL_POINT.sub("~", text) for text in alike]
    signed = [_SIGN.sub(lambda found: chr(0xE000 + ord(found[0][-1])), text) for text in pointed]
    parted = [_BETWEEN_NUMBERS.sub("\ue000", text) for text in signed]
    normal = [_INSIGNIFICANT.sub("", text) or text for text in parted]
    return hashlib.blake2b("\n".join(normal).encode(), digest_size=12).hexdigest()


def without_shared(train: Sequence[Example], test: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """Splits training rows into those that no test row shares and those that one does (any of its keys)."""
    known = {key for example in test for key in example.keys}
    kept: list[Example] = []
    shared: list[Example] = []
    for example in train:
        (kept if known.isdisjoint(example.keys) else shared).append(example)
    return kept, shared


def group_numbers(examples: Sequence[Example]) -> list[int]:
    """The number of each row's group, from 0 in the order of their first rows.

    Rows that share a key, such as the questions on one contract, are of one group, and so are those that a third row
    joins; a row without keys is a group of its own.
    """
    above = list(range(len(examples)))
    firsts: dict[str, int] = {}
    for row, example in enumerate(examples):
        for key in example.keys:
            ends = _top(above, firsts.setdefault(key, row)), _top(above, row)
            above[max(ends)] = min(ends)
    tops = [_top(above, row) for row in range(len(examples))]
    numbers = {top: number for number, top in enumerate(dict.fromkeys(tops))}
    return [numbers[top] for top in tops]


def _top(above: Sequence[int], row: int) -> int:
    while above[row] != row:
        row = above[row]
    return row
