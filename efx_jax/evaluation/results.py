"""The scores of a model's answers to one task, as a JSON-serialisable dictionary."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from efx_jax.data.overlap import group_numbers
from efx_jax.data.prompts import Example
from efx_jax.errors import InputError
from efx_jax.evaluation.rouge import ROUGE
from efx_jax.evaluation.scores import Interval, accuracy, bootstrap, bootstrap_mean, macro_f1

TITLES = {
    "accuracy": "accuracy %",
    "macro_f1": "macro-F1 %",
    "rouge1": "ROUGE-1 %",
    "rouge2": "ROUGE-2 %",
    "rougeL": "ROUGE-L %",
}
"""The metrics, those of tasks with answers to choose from first, and their column headings."""


def summarise(predicted: np.ndarray, examples: Sequence[Example], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy and macro-F1 with 95 % bootstrap intervals, counts per class, and the best constant answer.

    Args:
        predicted: chosen answer of every row, int [rows], or for several runs [runs,rows]; -1 if none could be read.
        examples: the rows; their responses are the references.
        labels: the C answers.

    Returns:
        A JSON-serialisable dictionary. `groups` is the number of groups of rows (`group_numbers`) over which the
        intervals are computed; for a single group they are None. For several runs: the mean of every metric, with
        `_std` (sample standard deviation over runs) and `_runs`; counts per class are summed over runs.

    Raises:
        InputError: a response is not among the answers.
    """
    reference = reference_numbers(examples, labels)
    runs = np.atleast_2d(predicted)
    constant = np.full_like(reference, np.argmax(np.bincount(reference, minlength=len(labels))))
    groups = np.asarray(group_numbers(examples))
    intervals = bootstrap(runs, reference, len(labels), groups)
    accuracies = np.asarray([accuracy(run, reference)[0] for run in runs])
    f1s = np.asarray([macro_f1(run, reference, len(labels))[0] for run in runs])
    return {
        "rows": len(reference),
        "groups": int(np.max(groups)) + 1,
        **_metric("accuracy", accuracies, intervals["accuracy"]),
        **_metric("macro_f1", f1s, intervals["macro_f1"]),
        "unparseable": float((runs == -1).mean()),
        "constant_answer": labels[int(constant[0])].strip(),
        "constant_accuracy": float(accuracy(constant, reference)[0]),
        "constant_macro_f1": float(macro_f1(constant, reference, len(labels))[0]),
        "classes": {
            label.strip(): {
                "rows": int((reference == number).sum()),
                "predicted": int((runs == number).sum()),
                "correct": int(((reference == number) & (runs == number)).sum()),
            }
            for number, label in enumerate(labels)
        },
    }


def summarise_texts(scores: np.ndarray, examples: Sequence[Example]) -> dict[str, Any]:
    """Mean ROUGE with 95 % bootstrap intervals.

    Args:
        scores: F-measures float [rows,3], or for several runs [runs,rows,3]; columns as in `ROUGE`.
        examples: the rows.

    Returns:
        A JSON-serialisable dictionary; several runs are treated as in `summarise`.
    """
    runs = scores.reshape(-1, *scores.shape[-2:])
    groups = np.asarray(group_numbers(examples))
    result: dict[str, Any] = {"rows": runs.shape[1], "groups": int(np.max(groups)) + 1}
    for column, name in enumerate(ROUGE):
        values = runs[:, :, column]
        result |= _metric(name, values.mean(axis=1), bootstrap_mean(values.mean(axis=0), groups))
    return result


def metric_cell(result: Mapping[str, Any], metric: str) -> str:
    """A metric in percent for a table: value [95 % interval], for several runs value ± standard deviation [interval];
    without brackets if there is no interval."""
    spread = f" ± {100 * result[f'{metric}_std']:.2f}" if f"{metric}_std" in result else ""
    ends = result[f"{metric}_interval"]
    return f"{100 * result[metric]:.2f}{spread}" + interval_cell([100 * end for end in ends] if ends else None, 2)


def interval_cell(ends: Sequence[float] | None, digits: int) -> str:
    """ " [low, high]" for a table, or "" if there is no interval."""
    return f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of texts: pipes are escaped, and line breaks, which would end the row, become blanks."""
    first, *lines = (_table_line(cells) for cells in (header, *rows))
    return "\n".join([first, "|" + "---|" * len(header), *lines])


def _table_line(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.splitlines()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _metric(name: str, runs: np.ndarray, interval: Interval | None) -> dict[str, Any]:
    found = {name: float(runs.mean()), f"{name}_interval": list(interval) if interval else None}
    if len(runs) > 1:
        found |= {f"{name}_std": float(runs.std(ddof=1)), f"{name}_runs": runs.tolist()}
    return found


def reference_numbers(examples: Sequence[Example], labels: Sequence[str]) -> np.ndarray:
    """The number of each row's response among the answers, int [rows]."""
    if not examples:
        raise InputError("test rows: expected at least one, found none")
    numbers = {label: number for number, label in enumerate(labels)}
    for row, example in enumerate(examples, start=1):
        if example.response not in numbers:
            raise InputError(
                f"{example.origin or f'test row {row}'}: response {example.response!r} is none of the answers "
                f"{', '.join(map(repr, labels))}"
            )
    return np.asarray([numbers[example.response] for example in examples])
