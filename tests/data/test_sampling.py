"""The sample that is scored is fixed, is no beginning of the file, and keeps a document's questions together."""

from collections import Counter

from efx_jax.data.prompts import Example
from efx_jax.data.sampling import sample_rows


def contracts(number: int, questions: int) -> list[Example]:
    return [Example(f"{c} {q}", " yes", keys=(f"contract {c}",)) for c in range(number) for q in range(questions)]


def test_a_sample_of_a_sorted_file_has_both_labels() -> None:
    rows = [Example(str(row), " no" if row < 500 else " yes", keys=(str(row),)) for row in range(1000)]
    sample = sample_rows(rows, 200)
    counts = Counter(row.response for row in sample)
    assert sum(counts.values()) == 200 and min(counts.values()) > 70
    numbers = [int(row.prompt) for row in sample]
    assert numbers == sorted(set(numbers))
    assert sample == sample_rows(rows, 200)
    assert set(numbers) > {int(row.prompt) for row in sample_rows(rows, 40)}


def test_contracts_are_drawn_whole_but_the_last() -> None:
    rows = contracts(30, 17)
    sample = sample_rows(rows, 100)
    counts = Counter(row.keys for row in sample)
    assert len(sample) == 100 and sorted(counts.values()) == [15, 17, 17, 17, 17, 17]
    cut = next(key for key, count in counts.items() if count == 15)
    assert [row for row in sample if row.keys == cut] == [row for row in rows if row.keys == cut][:15]
    assert sample != rows[:100] and [row for row in rows if row in sample] == sample


def test_all_rows_are_taken_where_there_are_no_more() -> None:
    rows = contracts(3, 2)
    assert sample_rows(rows, 0) == sample_rows(rows, 6) == sample_rows(rows, 99) == rows
    assert len(sample_rows([Example(str(row), " a") for row in range(9)], 4)) == 4
