"""The built-in task "icd10": assign a diagnosis to its chapter of ICD-10-CM (the United States' coding of diseases).

Source: the code tables of the U.S. National Center for Health Statistics, a work of the federal government, as shipped
in the PyPI package `simple-icd-10-cm` (MIT). `pip` installs them, so the task runs where nothing else can be
downloaded.
"""

import dataclasses
import types
from collections.abc import Iterable, Sequence

import numpy as np

from efx_jax.data.prompts import Example
from efx_jax.errors import InputError

# One short name per chapter. Chapter 22 (codes for special purposes, U00-U85) is left out: it has 2 categories with 5
# codes, too few to hold categories out.
CHAPTERS = {
    "1": "infections",
    "2": "neoplasms",
    "3": "blood",
    "4": "endocrine",
    "5": "mental",
    "6": "nervous",
    "7": "eye",
    "8": "ear",
    "9": "circulatory",
    "10": "respiratory",
    "11": "digestive",
    "12": "skin",
    "13": "musculoskeletal",
    "14": "genitourinary",
    "15": "pregnancy",
    "16": "perinatal",
    "17": "congenital",
    "18": "symptoms",
    "19": "injury",
    "20": "external causes",
    "21": "health services",
}

PROMPT = "Diagnosis: {description}\nICD-10-CM chapter:"
_SPLIT_SEED = 1010  # for the split, the test rows and the texts: the same whatever the run's seed
_HELD_OUT = 0.2  # share of each chapter's categories
_LINES_PER_TEXT = 4


@dataclasses.dataclass(frozen=True)
class Code:
    """One code: "E11.9", its description, its category ("E11") and its chapter ("4")."""

    name: str
    description: str
    category: str
    chapter: str


@dataclasses.dataclass(frozen=True)
class IcdData:
    """What `icd10_task` returns.

    `train` and `test` are questions, `labels` all responses. `train_text` and `text` are rows of up to 4 neighbouring
    code lines such as "E11.9 Type 2 diabetes mellitus without complications", from training categories and from
    held-out categories (for perplexity) respectively.
    """

    train: list[Example]
    test: list[Example]
    labels: tuple[str, ...]
    train_text: list[str]
    text: list[str]


def icd10_task(seed: int, train_rows: int, test_rows: int) -> IcdData:
    """Builds the task.

    A fifth of the three-character categories of every chapter is held out, always the same ones; descriptions that
    also occur in a training category, or in two chapters, are left out of the held-out part. Questions cycle through
    the 21 chapters, so that any prefix is balanced. Codes with a seventh-character extension ("initial encounter") are
    left out: they repeat their parents. Deterministic.

    Args:
        seed: chooses the training questions and their order; split, test questions and texts do not depend on it.
        train_rows: training questions; every chapter contributes the same number, rounded down.
        test_rows: held-out questions, likewise.

    Raises:
        InputError: the package is missing, or more rows are requested than the smallest chapter can provide.
    """
    train, held_out = _split(_read_codes(_import_tables()))
    return IcdData(
        train=_questions(train, train_rows, seed, "train_rows"),
        test=_questions(held_out, test_rows, _SPLIT_SEED, "test_rows"),
        labels=tuple(_response(chapter) for chapter in CHAPTERS),
        train_text=_texts(train),
        text=_texts(held_out),
    )


def _import_tables() -> types.ModuleType:
    try:
        import simple_icd_10_cm
    except ImportError as error:
        raise InputError(
            'data.train icd10: needs the package simple-icd-10-cm; run: pip install "efx-jax[quickstart]" '
            "or pip install simple-icd-10-cm"
        ) from error
    return simple_icd_10_cm


def _read_codes(tables: types.ModuleType) -> list[Code]:
    """Categories and subcategories in the order of the classification, without extended codes."""
    codes, chapter, category = [], "", ""
    for name in tables.get_all_codes(with_dots=True):
        if tables.is_chapter(name):
            chapter = name
        elif (
            chapter in CHAPTERS and tables.is_category_or_subcategory(name) and not tables.is_extended_subcategory(name)
        ):
            category = name if tables.is_category(name) else category
            codes.append(Code(name, tables.get_description(name), category, chapter))
    return codes


def _split(codes: Sequence[Code]) -> tuple[list[Code], list[Code]]:
    """(training, held-out) codes, disjoint by category and by description."""
    held_categories: set[str] = set()
    for chapter in CHAPTERS:
        categories = list(dict.fromkeys(code.category for code in codes if code.chapter == chapter))
        generator = np.random.default_rng([_SPLIT_SEED, int(chapter)])
        order = generator.permutation(len(categories))[: round(_HELD_OUT * len(categories))]
        held_categories |= {categories[i] for i in order}
    chapters_of: dict[str, set[str]] = {}
    for code in codes:
        chapters_of.setdefault(code.description.lower(), set()).add(code.chapter)
    codes = [code for code in codes if len(chapters_of[code.description.lower()]) == 1]
    train = _distinct(code for code in codes if code.category not in held_categories)
    known = {code.description.lower() for code in train}
    held_out = _distinct(code for code in codes if code.category in held_categories)
    return train, [code for code in held_out if code.description.lower() not in known]


def _distinct(codes: Iterable[Code]) -> list[Code]:
    """The last code of each description: a category with a single code below it repeats its description there."""
    return list({code.description.lower(): code for code in codes}.values())


def _questions(codes: Sequence[Code], rows: int, seed: int, name: str) -> list[Example]:
    per_chapter = rows // len(CHAPTERS)
    drawn = []
    for chapter in CHAPTERS:
        pool = [code for code in codes if code.chapter == chapter]
        if per_chapter > len(pool):
            raise InputError(
                f"icd10: {name} {rows} is {per_chapter} questions per chapter; chapter {chapter} has {len(pool)}; "
                f"ask for at most {len(pool) * len(CHAPTERS)}"
            )
        order = np.random.default_rng([seed, int(chapter)]).permutation(len(pool))[:per_chapter]
        drawn.append([pool[i] for i in order])
    return [_question(code) for turn in zip(*drawn, strict=True) for code in turn]


def _question(code: Code) -> Example:
    return Example(PROMPT.format(description=code.description), _response(code.chapter), f"icd10 code {code.name}")


def _response(chapter: str) -> str:
    return f" {CHAPTERS[chapter]}"


def _texts(codes: Sequence[Code]) -> list[str]:
    """Rows of neighbouring lines of one category: the same number from every chapter, cycling through the chapters."""
    per_chapter = []
    for chapter in CHAPTERS:
        rows = _runs([code for code in codes if code.chapter == chapter])
        order = np.random.default_rng([_SPLIT_SEED, 1, int(chapter)]).permutation(len(rows))
        per_chapter.append([rows[i] for i in order])
    return [row for turn in zip(*per_chapter, strict=False) for row in turn]


def _runs(codes: Sequence[Code]) -> list[str]:
    by_category: dict[str, list[str]] = {}
    for code in codes:
        by_category.setdefault(code.category, []).append(f"{code.name} {code.description}")
    return [
        "\n".join(lines[start : start + _LINES_PER_TEXT])
        for lines in by_category.values()
        for start in range(0, len(lines), _LINES_PER_TEXT)
    ]
