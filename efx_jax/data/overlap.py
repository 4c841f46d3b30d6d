"""Rows that share an identifying text, compared regardless of case, punctuation and blanks."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from efx_jax.data.prompts import Example

# Excludes <, >, =, + and ~, and also the vowel signs of many scripts, which \W would match.
_INSIGNIFICANT = re.compile(r"[\s!-*,-/:;?@\[-`{-}\u00a1\u00ab\u00b7\u00bb\u00bf\u2000-\u206f\u3000-\u303f]+")
_DECIMAL_POINT = re.compile(r"(?<=\d)\.(?=\d)")
# What distinguishes formulas: a sign between numbers, a minus or dollar sign before a number, the sharp of C#.
_SIGN = re.compile(r"(?<=\d)\s*[-*/%^](?=\s*\d)|(?<!\w)[-$](?=\d)|(?<=\w)#")
# Where one number ends and the next begins; the comma of 1,000 does neither.
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)[,;:]*\s[\s,;:]*(?=\d)")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"))


def fingerprint(*texts: str) -> str:
    """A short hash of some texts that ignores case, punctuation and blanks, unless a text has nothing else.

    Comparison and arithmetic signs, decimal points and the boundaries between numbers count: they distinguish questions
    about doses and formulas. Characters that are equivalent under Unicode NFKC count as the same.
    """
    alike = [unicodedata.normalize("NFKC", text).casefold().translate(_DASHES) for text in texts]
    # Signs become characters that occur in no text.
    pointed = [_DECIMAL_POINT.sub("~", text) for text in alike]
    signed = [_SIGN.sub(lambda found: chr(0xE000 + ord(found[0][-1])), text) for text in pointed]
    parted = [_BETWEEN_NUMBERS.sub("\ue000", text) for text in signed]
    normal = [_INSIGNIFICANT.sub("", text) or text for text in parted]
    return hashlib.blake2b("\n".join(normal).encode(), digest_size=12).hexdigest()


def without_shared(train: Sequence[Example], test: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """Splits training rows into those that share no key with a test row and those that share at least one."""
    known = {key for example in test for key in example.keys}
    kept: list[Example] = []
    shared: list[Example] = []
    for example in train:
        (kept if known.isdisjoint(example.keys) else shared).append(example)
    return kept, shared


def group_numbers(examples: Sequence[Example]) -> list[int]:
    """The number of each row's group; groups are numbered from 0 in the order of their first rows.

    Rows that share a key, such as the questions on one contract, are in one group, as are rows linked through a third
    row; a row without keys is a group of its own.
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
