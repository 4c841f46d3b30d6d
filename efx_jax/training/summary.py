"""What there is to read when a run is over: summary.json and the printed tables."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from efx_jax.files import atomic_write
from efx_jax.model.spec import linear_shapes
from efx_jax.training.journal import Journal, peak_memory_mib
from efx_jax.training.measure import matrix_sparsity, result_table, rows_table, sparsity_table
from efx_jax.training.prepare import Prepared
from efx_jax.training.schedule import Event

_UNITS = {
    "heads": "key/value heads",
    "hidden": "hidden units",
    "key_dims": "pairs of key dimensions",
    "value_dims": "value dimensions",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "efx_jax")


def write_summary(
    output: Path,
    exported: Mapping[str, Any],
    prepared: Prepared,
    journal: Journal,
    steps: int,
    events: Sequence[Event],
    seed: int,
    cut: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `summary.json` from the first process; all processes must call it.

    Args:
        output: the run's folder.
        exported: parameter tree read back from the export.
        prepared: the base model, and the counts of the rows.
        journal: what the run has measured.
        steps: number of updates behind the exported model.
        events: the prune events.
        seed: the run's seed.
        cut: for a model that lost units, see `search.cut_report`.

    Returns:
        What was written.
    """
    without = {
        model: {name: value for name, value in found.items() if name != "samples"}
        for model, found in journal.results.items()
    }
    summary = {
        "results": without,
        "data": dict(prepared.data.report),
        "sparsity": matrix_sparsity(exported, linear_shapes(prepared.spec)),
        "entries": {name: math.prod(shape) for name, shape in linear_shapes(prepared.spec).items()},
        **({} if cut is None else {"cut": dict(cut)}),
        "steps": steps,
        "best": None if journal.best is None else dataclasses.asdict(journal.best),
        "tokens": journal.tokens,
        # Rows of distillation text have no labels: only a teacher makes use of them.
        "taught": {
            "teacher": prepared.teacher is not None,
            "text_rows": sum(not row.loss.any() for row in prepared.train),
        },
        "events": [dataclasses.asdict(event) for event in events],
        "seconds": {name: round(value, 2) for name, value in journal.seconds.items()},
        "peak_memory_mib": max(peak_memory_mib(), *journal.memory.values()),
        "memory_mib": {name: round(value, 1) for name, value in journal.memory.items()},
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | _versions(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "seed": seed,
    }
    if jax.process_index() == 0:
        atomic_write(output / "summary.json", json.dumps(_finite(summary), indent=1, allow_nan=False))
    return summary


def _finite(value: Any) -> Any:
    """Replaces numbers that are not finite by None, as JSON cannot represent them."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_summary(summary: Mapping[str, Any], output: Path) -> None:
    """Prints the results, best constant answers, the rows of a mix, what was cut out, the sparsity of every kind of
    matrix, and the time."""
    print(result_table(summary["results"]))
    tasks = {name: task for found in summary["results"].values() for name, task in found.get("tasks", {}).items()}
    for name, task in tasks.items():
        if "constant_accuracy" in task:
            print(
                f"\nbest constant answer to {name}: accuracy {100 * task['constant_accuracy']:.2f} %, "
                f"macro-F1 {100 * task['constant_macro_f1']:.2f} % on {task['rows']} rows"
            )
    if "tasks" in summary["data"]["train"]:
        print("\n" + rows_table(summary["data"]))
    if "cut" in summary:
        print("\n" + _cut_text(summary["cut"]))
    print("\n" + sparsity_table(summary["sparsity"], "pruned %" if "cut" in summary else "zeros %"))
    best = summary["best"]
    if best:
        print(f"\nexported: the model of step {best['step']}, by {best['metric']} {best['value']:.4g}")
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
    print(f"\nseconds: {phases}; peak memory {summary['peak_memory_mib']:.0f} MiB")
    print(f"the expert: {output / 'export'}")
    if (output / "report.html").exists():
        print(f"the report: {output / 'report.html'}")


def _cut_text(cut: Mapping[str, Any]) -> str:
    before, kept, written = (cut["parameters"][name] for name in ("before", "kept", "written"))
    units = ", ".join(f"{_range(counts)} {_UNITS[kind]}" for kind, counts in cut["units"].items())
    fill = f", {written - kept:,} of them zeros" if written > kept else ""
    return (
        f"cut out: {100 * cut['removed']:.2f} % of the weights of the linears; a layer keeps {units}\n"
        f"parameters: {before:,} before, {written:,} in the export ({100 * written / before:.1f} %){fill}"
    )


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
