"""The built-in task leaks nothing, is balanced, and is the same every time."""

import collections
import sys
import types

import pytest

from efx_jax.data.icd10 import CHAPTERS, icd10_task
from efx_jax.errors import InputError

pytest.importorskip("simple_icd_10_cm")


def codes_of(texts: list[str]) -> set[str]:
    return {line.split(" ", 1)[0] for text in texts for line in text.split("\n")}


def categories(codes: set[str]) -> set[str]:
    return {code.split(".", 1)[0] for code in codes}


@pytest.fixture(scope="module")
def data():
    return icd10_task(seed=0, train_rows=3150, test_rows=840)


def test_held_out_categories_never_occur_in_training(data) -> None:
    train = codes_of(data.train_text) | {example.origin.split()[-1] for example in data.train}
    held_out = codes_of(data.text) | {example.origin.split()[-1] for example in data.test}
    assert len(categories(held_out)) > 250
    assert not categories(train) & categories(held_out)


def test_no_held_out_description_occurs_in_training(data) -> None:
    def descriptions(texts: list[str]) -> set[str]:
        return {line.split(" ", 1)[1].lower() for text in texts for line in text.split("\n")}

    train = {example.prompt.lower() for example in data.train}
    assert not train & {example.prompt.lower() for example in data.test}
    assert len(train) == len(data.train)
    assert not descriptions(data.train_text) & descriptions(data.text)


def test_descriptions_shared_with_training_or_another_chapter_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    described: dict[str, str] = {}
    for chapter in CHAPTERS:
        described[chapter] = "chapter"
        for number in range(10):
            category = f"{chapter}C{number}"
            described |= {category: f"Own {category}", f"{category}.1": f"Shared {chapter}", f"{category}.2": "SHARED"}
    tables = types.SimpleNamespace(
        get_all_codes=lambda with_dots: list(described),
        is_chapter=lambda name: name in CHAPTERS,
        is_category_or_subcategory=lambda name: name not in CHAPTERS,
        is_extended_subcategory=lambda name: False,
        is_category=lambda name: "." not in name,
        get_description=described.get,
    )
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", tables)
    data = icd10_task(0, 21, 42)
    lines = [line for text in data.text for line in text.split("\n")]
    assert len(lines) == 2 * 21
    assert all(line.split(" ", 1)[1] == f"Own {line.split(' ', 1)[0]}" for line in lines)
    assert not any("SHARED" in text for text in data.train_text)
    assert sum("Shared" in text for text in data.train_text) == 21


def test_every_prefix_of_the_questions_is_balanced(data) -> None:
    for examples in (data.train, data.test[:63], data.test):
        counts = collections.Counter(example.response for example in examples)
        assert set(counts) == set(data.labels)
        assert len(set(counts.values())) == 1


def test_labels_are_distinct_and_responses_start_with_a_space(data) -> None:
    assert len(set(data.labels)) == len(CHAPTERS) == 21
    assert all(label.startswith(" ") and label.strip() for label in data.labels)
    assert all(example.prompt.endswith("ICD-10-CM chapter:") for example in data.test)


def test_the_seed_moves_training_questions_only(data) -> None:
    again, other = icd10_task(0, 3150, 840), icd10_task(1, 3150, 840)
    assert again == data
    assert other.train != data.train
    assert (other.test, other.text, other.train_text) == (data.test, data.text, data.train_text)


def test_asking_for_too_many_rows_names_the_limit() -> None:
    with pytest.raises(InputError, match=r"test_rows 10000 .* ask for at most"):
        icd10_task(0, 21, 10000)


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(InputError, match="pip install"):
        icd10_task(0, 21, 21)
