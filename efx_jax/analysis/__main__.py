"""`python -m efx_jax.analysis RUN [RUN ...]`: what scores promise and what they do, along a dense run."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis import mask_overlap, score_error
from efx_jax.analysis.blocks import Model, look_at
from efx_jax.analysis.canvas import require_matplotlib
from efx_jax.analysis.figures import draw_overlaps, draw_score_errors
from efx_jax.analysis.runs import Run, choose_steps, load_base, open_run, run_adapters, training_rows
from efx_jax.analysis.tables import overlap_table, score_error_table
from efx_jax.errors import InputError, OneLineParser, exit_code, positive_number, whole_number
from efx_jax.files import atomic_write, refuse_unwritable
from efx_jax.pruning.selection import selection_counts

ANALYSES = ("score_error", "mask_overlap")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 2 for bad input, told in one line on stderr, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments), "error", "interrupted; of the run at hand nothing is written")


def _run(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    refuse_unwritable(output)
    _check(arguments)
    runs = _open_all(arguments.runs)
    steps = [choose_steps(run, tuple(arguments.steps)) for run in runs]
    for run, chosen in zip(runs, steps, strict=True):
        _analyse(run, chosen, arguments, output / _name(run))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m efx_jax.analysis", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders that train.py has written")
    add("--what", nargs="+", choices=ANALYSES, default=list(ANALYSES), help="which analyses; default: all")
    add("--output", default="runs/analysis", metavar="DIR", help="writes into DIR/NAME of every run")
    add(
        "--steps",
        nargs="+",
        type=whole_number,
        default=[],
        help="checkpoints; 0: the base; default: 0 and every dense one",
    )
    add("--layers", type=whole_number, default=8, help="so many layers, evenly spaced; 0: all")
    add("--sparsity", type=float, default=0.5, help="of the masks; default: 0.5")
    add("--group", default="bounded", help="score_error: entries that compete; default: bounded")
    add("--bound", type=float, default=0.2, help="of the group bounded; default: 0.2")
    add("--rows", type=positive_number, default=8, help="training sequences looked at; default: 8")
    add("--length", type=positive_number, default=256, help="most tokens of each; default: 256")
    add("--entries", type=whole_number, default=64, help="score_error: single entries removed of every matrix; 0: none")
    add("--loss-rows", type=whole_number, default=4, help="score_error: rows of the loss, the longest part; default: 4")
    add("--seed", type=whole_number, default=0, help="draws the single entries")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Refuses masks that no matrix can have, and figures that cannot be drawn, before any long work."""
    require_matplotlib()
    for group in ("bounded", arguments.group):
        # A width that every pattern divides: whether it divides the model's is known when that is read.
        selection_counts((1, 2520), arguments.sparsity, group, arguments.bound)


def _open_all(folders: Sequence[str]) -> list[Run]:
    runs = [open_run(Path(folder)) for folder in folders]
    names = [_name(run) for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: expected runs of different names, found two; analyse them one by one")
    return runs


def _name(run: Run) -> str:
    return run.folder.resolve().name


def _analyse(run: Run, steps: Sequence[int], arguments: argparse.Namespace, folder: Path) -> None:
    """All analyses of one run: a table on stdout, DIR/NAME/ANALYSIS.json and figures."""
    params, spec = load_base(run)
    batch = training_rows(run, spec, arguments.rows, arguments.length)
    layers = _spaced(spec.num_layers, arguments.layers)
    found: dict[str, dict[int, list[Any]]] = {name: {} for name in arguments.what}
    for step in steps:
        model = look_at(params, run_adapters(run, step), batch, spec)
        for name in arguments.what:
            print(f"{_name(run)}, step {step}: {name}", file=sys.stderr)
            found[name][step] = _measure(name, model, layers, arguments)
    asked = vars(arguments) | {"runs": [str(run.folder)], "layers": layers, "tokens": int(batch["lengths"].sum())}
    for name, by_step in found.items():
        _write(name, by_step, asked, folder)
    print(f"written to {folder}", file=sys.stderr)


def _measure(name: str, model: Model, layers: Sequence[int], arguments: argparse.Namespace) -> list[Any]:
    if name == "mask_overlap":
        return list(mask_overlap.mask_overlaps(model, layers, arguments.sparsity, arguments.bound))
    pruning = score_error.Pruning(arguments.sparsity, arguments.group, arguments.bound)
    return list(
        score_error.score_errors(model, layers, pruning, arguments.entries, arguments.loss_rows, arguments.seed)
    )


def _write(name: str, by_step: dict[int, list[Any]], asked: dict[str, Any], folder: Path) -> None:
    summarise = mask_overlap.summarise if name == "mask_overlap" else score_error.summarise
    summary = {step: summarise(found) for step, found in by_step.items()}
    steps = [
        {"step": step, "summary": summary[step], "matrices": [dataclasses.asdict(each) for each in found]}
        for step, found in by_step.items()
    ]
    atomic_write(folder / f"{name}.json", json.dumps({"asked": asked, "steps": steps}, indent=1) + "\n")
    draw, table = (draw_overlaps, overlap_table) if name == "mask_overlap" else (draw_score_errors, score_error_table)
    draw(folder, by_step)
    print(table(summary))


def _spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` layers, evenly spaced, the first and the last among them; all of them for 0."""
    if wanted in (0, 1) or wanted >= count:
        return list(range(count)) if wanted != 1 else [count // 2]
    return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
