"""What a dry run says of text that a teacher teaches: its own steps and tokens, and a warning where they differ."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from efx_jax.compare.grid import list_cells
from efx_jax.compare.plan import flattered_texts, plan_lines, uneven_training
from efx_jax.compare.settings import read_comparison
from efx_jax.config_io import config_folder

Write = Callable[..., Path]
EPOCHS = "train: {epochs: 2, steps: 0, batch_size: 2, remat: none}"
METHODS = """
methods:
  dense: {{prune: {{sparsity: 0}}}}
  wanda: {{}}
  taught: {{distill: {{teacher: base, text: {text}}}}}
  more: {{distill: {{teacher: base, text: {text}, text_share: 0.75}}}}
  same: {{distill: {{teacher: base, text: {text}, share: 0.5}}}}
"""


@pytest.fixture
def uneven(write: Write, tiny_folder: Path) -> Callable[[str, str], Path]:
    """`uneven(train, data)`: a comparison of taught and other methods; both are YAML below the base."""

    def write_file(train: str, data: str = "") -> Path:
        folder = write("any").parent
        base = f"""
base:
  model: {{path: {tiny_folder}, compute_dtype: float32}}
  data: {{train: {folder}/train.jsonl, holdout: 0, max_length: 32{data}}}
  {train}
schedules: {{post_hoc: {{prune: {{schedule: fractions, fractions: [1]}}}}}}
"""
        return write("uneven", base + METHODS.format(text=folder / "text.jsonl"))

    return write_file


def planned(file: Path, runs: Path) -> dict[str, tuple[int, int]]:
    """Steps and tokens by method."""
    comparison = read_comparison(file)
    lines = plan_lines(comparison, list_cells(comparison), runs)[:-1]
    found = {line.split()[1].partition("/")[0].rstrip(","): line.partition(": ")[2].split() for line in lines}
    return {method: (int(words[0]), int(words[3])) for method, words in found.items()}


def test_steps_and_tokens_are_those_of_the_methods_own_text(uneven: Callable[..., Path], tmp_path: Path) -> None:
    sizes = planned(uneven(EPOCHS), tmp_path)
    assert sizes["dense"] == sizes["wanda"] and sizes["taught"] == sizes["same"]
    # Half of the tokens, then three quarters of them, are the text's.
    assert sizes["dense"] < sizes["taught"] < sizes["more"]
    assert sizes["taught"][1] > 1.5 * sizes["dense"][1]


@pytest.mark.parametrize(
    ("train", "data", "found"),
    [
        (EPOCHS, "", "found 0 and padding"),
        (EPOCHS, ", batching: packing", "found 0 and packing"),
        ("train: {steps: 3, batch_size: 2}", "", "found 3 and padding"),
        ("train: {steps: 3, batch_size: 2}", ", batching: packing", ""),
        ("train: {steps: 0, epochs: 0}", "", ""),
    ],
)
def test_methods_that_train_on_more_tokens_than_others_are_named(
    uneven: Callable[..., Path], train: str, data: str, found: str
) -> None:
    said = uneven_training(list_cells(read_comparison(uneven(train, data))))
    assert "\n" not in said and bool(said) == bool(found)
    if found:
        assert said.startswith("more/post_hoc, seed 0 trains on more tokens than dense, seed 0, as distill.text ")
        assert f"expected train.steps above 0 and data.batching packing, {found}; set both in the base" in said


def test_the_warning_is_a_line_before_anything_is_done(
    uneven: Callable[..., Path], launch: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(uneven(EPOCHS), tmp_path / "out", "--dry-run", "--only", "dense") == 0
    line, seen = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert seen.startswith("warning: uneven: evaluate.texts ") and "is distill.text of taught/post_hoc" in seen
    assert line.startswith("warning: uneven: more/post_hoc, seed 0 trains on more tokens than dense, seed 0")


def shipped() -> Iterator[Path]:
    for folder in (".", "ablations", "rivals"):
        yield from (path for path in (config_folder() / folder).glob("*.yaml") if "methods:" in path.read_text())


@pytest.mark.parametrize("path", sorted(shipped()), ids=lambda path: path.stem)
def test_methods_of_the_shipped_comparisons_train_on_as_many_tokens(path: Path) -> None:
    comparison = read_comparison(path)
    assert uneven_training(list_cells(comparison)) == "" and flattered_texts(comparison, list_cells(comparison)) == []


def test_a_text_that_a_method_has_seen_is_named_once_with_its_use(write: Write) -> None:
    file = write(
        "seen",
        """
base: {data: {test: [icd10]}}
methods:
  dense: {prune: {sparsity: 0, calibration: [c4]}}
  wanda: {prune: {calibration: [train, wikitext]}}
  again: {prune: {calibration: [wikitext], score: magnitude}}
  taught: {distill: {teacher: base, text: wikitext}}
schedules: {during: {prune: {schedule: epochs}}}
evaluate: {texts: {general: wikitext, other: c4}}
""",
    )
    comparison = read_comparison(file)
    first, second = flattered_texts(comparison, list_cells(comparison))
    assert first.startswith("evaluate.texts general: wikitext is prune.calibration of wanda/during, seed 0 too")
    assert second.startswith("evaluate.texts general: wikitext is distill.text of taught/during, seed 0 too")
