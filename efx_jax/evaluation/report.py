"""What an evaluation produces: Markdown tables, summary.json, results.md and predictions.jsonl."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efx_jax.evaluation.perplexity import Perplexity
from efx_jax.evaluation.results import TITLES, interval_cell, markdown_table, metric_cell
from efx_jax.files import atomic_write

Results = Mapping[str, Mapping[str, Any]]


def results_tables(text: Perplexity | None, results: Results, relative: Mapping[str, Any] | None) -> str:
    """The results as Markdown: perplexity, tasks with answers to choose from, free-text tasks, Rel.%, shortened rows,
    and notes.

    Args:
        text: perplexity, if measured.
        results: what `evaluate_task` returns, by task.
        relative: Rel.% with "to", the dense model's folder, if requested.
    """
    parts = [] if text is None else [_perplexity_table(text)]
    chosen = {name: result for name, result in results.items() if "classes" in result}
    written = {name: result for name, result in results.items() if "classes" not in result}
    parts += [_task_table(group) for group in (chosen, written) if group]
    if results:
        parts.append(_legend(results))
    if relative is not None:
        ends = interval_cell(relative["interval"], 2)
        parts.append(f"Rel. {relative['value']:.2f} %{ends} of {relative['to']}")
    parts += [
        f"{name}: {result['shortened']} of {result['rows']} rows shortened to fit; "
        f"{100 * result['context_kept']:.1f} % of the task's context is left"
        for name, result in results.items()
        if result["shortened"]
    ]
    parts += [f"{name}: {result['note']}" for name, result in results.items() if result["note"]]
    return "\n\n".join(parts)


def write_evaluation(
    folder: Path,
    arguments: Mapping[str, Any],
    text: Perplexity | None,
    results: Results,
    relative: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Writes predictions.jsonl, results.md and, last, summary.json.

    Args:
        folder: output folder; created if needed.
        arguments: the command's arguments.
        text: perplexity, if measured.
        results: results by task.
        relative: Rel.%, if requested.
        seconds: seconds by task, without loading.
        records: the predictions of all tasks.

    Raises:
        InputError: the disk is full or the folder is not writable.
    """
    summary = {
        "arguments": dict(arguments),
        "perplexity": None if text is None else _perplexity_fields(text),
        "tasks": dict(results),
        "relative": None if relative is None else dict(relative),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    # summary.json is written last: its presence means that the other files are complete.
    (folder / "summary.json").unlink(missing_ok=True)
    atomic_write(folder / "predictions.jsonl", "".join(lines))
    atomic_write(folder / "results.md", results_tables(text, results, relative) + "\n")
    atomic_write(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _perplexity_table(text: Perplexity) -> str:
    cells = [f"{text.value:.3f}{interval_cell(text.interval, 3)}", str(text.tokens), str(len(text.window_nll))]
    return markdown_table(["perplexity", "tokens", "windows"], [cells])


def _task_table(results: Results) -> str:
    metrics = [name for name in TITLES if name in next(iter(results.values()))]
    has_classes = "accuracy" in metrics
    header = ["task", "rows", *(TITLES[name] for name in metrics)]
    rows = [
        [name, str(result["rows"]), *(metric_cell(result, metric) for metric in metrics), *_answer_cells(result)]
        for name, result in results.items()
    ]
    answers = ["best constant answer", "answer given most", "unparseable %"] if has_classes else []
    return markdown_table([*header, *answers], rows)


def _answer_cells(result: Mapping[str, Any]) -> list[str]:
    if "classes" not in result:
        return []
    constant = f"{100 * result['constant_accuracy']:.2f} ({result['constant_answer']})"
    given = {label: counts["predicted"] for label, counts in result["classes"].items()}
    most = max(given, key=lambda label: given[label])
    share = 100 * given[most] / (result["rows"] * result["runs"])
    return [constant, f"{most} ({share:.0f} %)", f"{100 * result['unparseable']:.2f}"]


def _legend(results: Results) -> str:
    protocols = {(result["protocol"], result["runs"]) for result in results.values()}
    named = ", ".join(sorted(f"{name} ({runs} runs)" if runs > 1 else name for name, runs in protocols))
    value = "mean ± standard deviation over runs" if any(runs > 1 for _, runs in protocols) else "value"
    shared = [name for name, result in results.items() if result["groups"] < result["rows"]]
    together = f"; of {', '.join(shared)} over groups of rows that share a text" if shared else ""
    return f"Protocol {named}: {value} [95 % bootstrap interval over rows{together}]."


def _perplexity_fields(text: Perplexity) -> dict[str, Any]:
    # JSON has no infinity, which the perplexity of a ruined model may be.
    value, nll, *ends = (
        number if math.isfinite(number) else None for number in (text.value, text.nll_sum, *(text.interval or ()))
    )
    return {
        "value": value,
        "interval": ends or None,
        "nll_sum": nll,
        "tokens": text.tokens,
        "windows": len(text.window_nll),
        "window_nll": [round(float(number), 4) if math.isfinite(number) else None for number in text.window_nll],
        "window_tokens": text.window_tokens.tolist(),
        "text": text.text,
    }
