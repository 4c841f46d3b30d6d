"""Rel.%: the share of a dense model's scores that is retained, over all tasks (EfficientXpert, arXiv 2511.19935)."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efx_jax.errors import InputError
from efx_jax.evaluation.results import TITLES
from efx_jax.evaluation.rouge import ROUGE
from efx_jax.evaluation.scores import RESAMPLES, accuracy, interval, macro_f1, resample_counts
from efx_jax.files import read_text

Results = Mapping[str, Mapping[str, Any]]
Records = Sequence[Mapping[str, Any]]
_CLASS_METRICS = ("accuracy", "macro_f1")
_MOST_UNDEFINED = 0.025  # the share of resamples beyond one end of the interval


def relative(found: Results, records: Records, dense: Results, dense_records: Records) -> dict[str, Any]:
    """Rel.% = 100 (sum of accuracy ratios + sum of F1 ratios + mean of the ROUGE ratios) / (2 n + 1).

    n is the number of tasks with labels. The ROUGE ratios of all free-text tasks (three each) enter as one mean; if
    there is no such task, the + 1 is dropped. The paper prints the formula without the divisor, but its tables use it.

    Args:
        found: results by task.
        records: their predictions.
        dense: the dense model's results, on the same rows under the same protocol (`check_pairs`), none of them 0
            (`check_ratios`).
        dense_records: their predictions.

    Returns:
        "value", and "interval" (95 %, percentile bootstrap: both models see the same resample of every task's groups of
        rows; None if no task has two groups, or if a dense score is 0 in more than one resample in 40).

    Raises:
        InputError: predictions that do not match the results.
    """
    value = relative_value(found, dense)
    groups = {name: _groups(name, records) for name in found}
    if not any(numbers.any() for numbers in groups.values()):
        return {"value": value, "interval": None}
    resampled, resampled_dense = {}, {}
    for seed, name in enumerate(found):
        # Both models get the same draws, generated twice: for many rows they are too large to keep.
        resampled[name] = _scores(name, found[name], records, resample_counts(groups[name], RESAMPLES, seed))
        blocks = resample_counts(groups[name], RESAMPLES, seed)
        resampled_dense[name] = _scores(name, dense[name], dense_records, blocks)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _relative(resampled, resampled_dense)
    return {"value": value, "interval": _ends(values)}


def relative_value(found: Results, dense: Results) -> float:
    """Rel.% as in `relative`, without the interval.

    Args:
        found: results by task.
        dense: the dense model's results, on the same rows under the same protocol (`check_pairs`), none of them 0.
    """
    return float(_relative(found, {name: dense[name] for name in found}))


def check_pairs(found: Results, dense: Results, folder: Path) -> None:
    """Refuses a dense evaluation that does not have the same tasks, rows and protocol.

    Args:
        found: results by task, or before there are any, what `describe_task` returns.
        dense: the dense model's results.
        folder: where they come from, for messages.

    Raises:
        InputError: the first difference.
    """
    for has, lacks, where, without in (
        (found, dense, f"{folder}", "this one"),
        (dense, found, f"the tasks to compare with {folder}", "the dense model again"),
    ):
        missing = ", ".join(name for name in has if name not in lacks)
        if missing:
            raise InputError(
                f"{where}: no {missing}; evaluate both models on the same --tasks, or {without} without {missing}"
            )
    for name, result in found.items():
        other = dense[name]
        if other.get("protocol") != result["protocol"]:
            raise InputError(
                f"{folder}: {name} was evaluated under {other.get('protocol')}, here it is under {result['protocol']}; "
                "take the same --protocol"
            )
        for setting in ("normalize", "new_tokens"):
            if other.get(setting) != result[setting]:
                raise InputError(
                    f"{folder}: {name} was evaluated with {setting} {other.get(setting)}, here with {result[setting]}; "
                    "take the same, or evaluate the dense model again"
                )
        if other.get("rows_sha256") != result["rows_sha256"]:
            raise InputError(
                f"{folder}: {name} has other rows or prompts ({other.get('rows')} rows there, {result['rows']} here); "
                "take the same --rows, --template, --format and --max-length"
            )


def check_ratios(dense: Results, dense_records: Records, folder: Path) -> None:
    """Refuses a dense evaluation to which ratios cannot be formed, before the other model is evaluated.

    Args:
        dense: the dense model's results.
        dense_records: their predictions.
        folder: where they come from, for messages.

    Raises:
        InputError: a score of 0, or predictions that are garbled or do not match the results.
    """
    check_zeros(dense, folder)
    for name, result in dense.items():
        try:
            _scores(name, result, dense_records, [np.ones((1, result["rows"]))])
            _groups(name, dense_records)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: predictions of {name} are garbled ({error!r}); evaluate again") from error


def check_zeros(dense: Results, folder: Path) -> None:
    """Refuses a dense evaluation whose scores cannot be divided by.

    Raises:
        InputError: a score of 0.
    """
    for name, result in dense.items():
        zero = next((metric for metric in TITLES if result.get(metric) == 0), None)
        if zero is not None:
            raise InputError(
                f"{folder}: the dense model's {zero} on {name} is 0, so there is no ratio; "
                f"evaluate the dense model again without {name}, and this one too"
            )


def read_evaluation(folder: Path) -> tuple[Results, Records]:
    """Results by task and predictions, as written by `python -m efx_jax.evaluation --output`.

    Raises:
        InputError: a file is missing or garbled, or the folder is not an evaluation of tasks.
    """
    summary, predictions = folder / "summary.json", folder / "predictions.jsonl"
    for path in (summary, predictions):
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; expected a folder written by python -m efx_jax.evaluation --output"
            )
    try:
        tasks = json.loads(read_text(summary)).get("tasks")
        # Not splitlines: a text may contain other line-ending characters.
        records = [json.loads(line) for line in read_text(predictions).split("\n") if line]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder}: summary.json or predictions.jsonl is garbled ({error}); evaluate again") from error
    if not tasks:
        raise InputError(f"{summary}: holds no scores of tasks; expected those of python -m efx_jax.evaluation --tasks")
    return tasks, records


def warn_of_another_dtype(dense: Path, dtype: str) -> None:
    """Warns if a dense evaluation, checked by `read_evaluation`, used another compute dtype than this one will.

    Args:
        dense: the dense evaluation's folder.
        dtype: dtype of the matmul operands in this evaluation.
    """
    found = json.loads(read_text(dense / "summary.json")).get("arguments", {}).get("compute_dtype") or dtype
    if found != dtype:
        warnings.warn(
            f"{dense}: was evaluated with --compute-dtype {found}, here it is {dtype}; so roundings are a part of what "
            "is compared",
            stacklevel=2,
        )


def _relative(found: Mapping[str, Mapping[str, Any]], dense: Mapping[str, Mapping[str, Any]]) -> Any:
    """Rel.% of scores by task and metric: numbers, or arrays [R] of resamples."""
    ratios = [found[task][name] / dense[task][name] for task in found for name in _CLASS_METRICS if name in found[task]]
    rouge = [found[task][name] / dense[task][name] for task in found for name in ROUGE if name in found[task]]
    terms = [*ratios, sum(rouge) / len(rouge)] if rouge else ratios
    return 100 * sum(terms) / len(terms)


def _ends(values: np.ndarray) -> list[float] | None:
    """The 95 % interval of resampled values [R]; undefined ones count as beyond both ends, the cautious choice."""
    undefined = ~np.isfinite(values)
    low = interval(np.where(undefined, np.min(values, initial=np.inf, where=~undefined), values))[0]
    high = interval(np.where(undefined, np.max(values, initial=-np.inf, where=~undefined), values))[1]
    return [low, high] if np.mean(undefined) <= _MOST_UNDEFINED else None


def _groups(task: str, records: Records) -> np.ndarray:
    """Group numbers int [rows] of a task's rows."""
    numbers = {record["row"]: record["group"] for record in records if record["task"] == task}
    return np.asarray([numbers[row] for row in range(len(numbers))], int)


def _scores(
    task: str, result: Mapping[str, Any], records: Records, blocks: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """Every metric's mean over runs, [R] per resample; the blocks [r,n] say how often each resample draws each row."""
    runs, rows = result["runs"], result["rows"]
    own = {(record["run"], record["row"]): record for record in records if record["task"] == task}
    if len(own) != runs * rows:
        raise InputError(f"predictions of {task}: expected {runs * rows}, found {len(own)}; evaluate again")
    ordered = [own[run, row] for run in range(runs) for row in range(rows)]
    if "classes" not in result:
        values = {name: np.asarray([record[name] for record in ordered]).reshape(runs, rows) for name in ROUGE}
        means = {name: value.mean(axis=0) for name, value in values.items()}
        return _joined({name: each @ mean / each.sum(axis=1) for name, mean in means.items()} for each in blocks)
    numbers: dict[str | None, int] = {None: -1} | {label: number for number, label in enumerate(result["classes"])}
    reference = np.asarray([numbers[record["gold"]] for record in ordered[:rows]])
    predicted = np.asarray([numbers[record["prediction"]] for record in ordered]).reshape(runs, rows)
    classes = len(result["classes"])
    return _joined(
        {
            "accuracy": np.mean([accuracy(run, reference, each) for run in predicted], axis=0),
            "macro_f1": np.mean([macro_f1(run, reference, classes, each) for run in predicted], axis=0),
        }
        for each in blocks
    )


def _joined(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Dictionaries of arrays with the same names, concatenated by name."""
    held = list(parts)
    return {name: np.concatenate([part[name] for part in held]) for name in held[0]}
