"""The two ablations of scores, which go through a dense run's checkpoints one by one."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis import mask_overlap, score_error
from efx_jax.analysis.blocks import Model, look_at
from efx_jax.analysis.figures import draw_overlaps, draw_score_errors
from efx_jax.analysis.held import choose_steps, run_adapters
from efx_jax.analysis.runs import Run, load_base, training_rows
from efx_jax.analysis.studies import spaced
from efx_jax.analysis.tables import overlap_table, score_error_table, write_records
from efx_jax.files import atomic_write

NAMES = ("score_error", "mask_overlap")


def ablate(run: Run, names: Sequence[str], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs some ablations of one run: a table on stdout, FOLDER/NAME.json, NAME_records.csv, NAME.md and figures.

    Returns:
        By ablation name, the summary of every step.

    Raises:
        InputError: a run without a dense checkpoint.
    """
    steps = choose_steps(run, tuple(arguments.steps))
    params, spec = load_base(run)
    batch = training_rows(run, spec, arguments.rows, arguments.length)
    layers = spaced(spec.num_layers, arguments.layers)
    found: dict[str, dict[int, list[Any]]] = {name: {} for name in names}
    for step in steps:
        model = look_at(params, run_adapters(run, step), batch, spec)
        for name in names:
            print(f"{run.name}, step {step}: {name}", file=sys.stderr)
            found[name][step] = _measure(name, model, layers, arguments)
    asked = vars(arguments) | {"runs": [str(run.folder)], "layers": layers, "tokens": int(batch["lengths"].sum())}
    return {name: _write(name, by_step, asked, folder) for name, by_step in found.items()}


def _measure(name: str, model: Model, layers: Sequence[int], arguments: argparse.Namespace) -> list[Any]:
    if name == "mask_overlap":
        return list(mask_overlap.mask_overlaps(model, layers, arguments.sparsity, arguments.bound))
    pruning = score_error.Pruning(arguments.sparsity, arguments.group, arguments.bound)
    return list(
        score_error.score_errors(model, layers, pruning, arguments.entries, arguments.loss_rows, arguments.seed)
    )


def _write(name: str, by_step: dict[int, list[Any]], asked: dict[str, Any], folder: Path) -> dict[int, Any]:
    summarise = mask_overlap.summarise if name == "mask_overlap" else score_error.summarise
    summary = {step: summarise(found) for step, found in by_step.items()}
    matrices = {step: [dataclasses.asdict(each) for each in found] for step, found in by_step.items()}
    steps = [{"step": step, "summary": summary[step], "matrices": found} for step, found in matrices.items()]
    atomic_write(folder / f"{name}.json", json.dumps({"asked": asked, "steps": steps}, indent=1) + "\n")
    write_records(folder, name, [{"step": step} | record for step, found in matrices.items() for record in found])
    draw, make_table = (
        (draw_overlaps, overlap_table) if name == "mask_overlap" else (draw_score_errors, score_error_table)
    )
    table = make_table(summary)
    atomic_write(folder / f"{name}.md", table + "\n")
    draw(folder, by_step)
    print(table)
    return summary
