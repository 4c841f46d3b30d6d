"""`python -m efx_jax.analysis RUN [RUN ...]`: what runs learned, what they pruned, and what sets them apart."""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from efx_jax.analysis import ablations
from efx_jax.analysis.canvas import require_matplotlib
from efx_jax.analysis.runs import Run, open_run
from efx_jax.analysis.studies import OF_ONE, OF_SEVERAL, Found
from efx_jax.analysis.tables import study_table, write_study
from efx_jax.errors import InputError, OneLineParser, exit_code, positive_number, whole_number
from efx_jax.files import atomic_write, refuse_unwritable
from efx_jax.pruning.selection import selection_counts

ANALYSES = (*ablations.NAMES, *OF_SEVERAL, *OF_ONE)


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 2 for bad input, reported in one line on stderr, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments, argv), "error", "interrupted; of the analysis at hand nothing is written")


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    output = Path(arguments.output)
    refuse_unwritable(output)
    if arguments.summary:
        refuse_unwritable(Path(arguments.summary).parent)
        if Path(arguments.summary).is_dir():
            raise InputError(f"{arguments.summary}: is a folder, expected a file; choose another --summary")
    _check(arguments)
    runs = _open_all(arguments.runs)
    takes_all = "all" in arguments.what
    names = ANALYSES if takes_all else tuple(dict.fromkeys(arguments.what))
    command = shlex.join(["python", "-m", "efx_jax.analysis", *argv])
    summary: dict[str, Any] = {"command": command, "runs": {run.name: {} for run in runs}, "between": {}}
    missing: list[str] = []
    for name in (name for name in names if name in OF_SEVERAL):
        study = functools.partial(_study, name, OF_SEVERAL[name], runs, arguments, output, summary["between"])
        _attempt(name, study, missing)
    for run in runs:
        folder, own = output / run.name, summary["runs"][run.name]
        asked = [name for name in ablations.NAMES if name in names]
        if asked:
            _attempt(", ".join(asked), functools.partial(_ablations, run, asked, arguments, folder, own), missing)
        for name in (name for name in names if name in OF_ONE):
            print(f"{run.name}: {name}", file=sys.stderr)
            _attempt(name, functools.partial(_study, name, OF_ONE[name], run, arguments, folder, own), missing)
    if arguments.summary:
        atomic_write(Path(arguments.summary), json.dumps(summary, indent=1) + "\n")
    for reason in missing:
        print(f"{'left out' if takes_all else 'error'}: {reason}", file=sys.stderr)
    found = any(summary["runs"].values()) or bool(summary["between"])
    if found:
        print(f"written to {output}", file=sys.stderr)
    return 0 if found and (takes_all or not missing) else 2


def _attempt(name: str, work: Callable[[], object], missing: list[str]) -> None:
    """Runs one analysis; if it cannot be done, records why and lets the others go ahead."""
    try:
        work()
    except InputError as error:
        missing.append(f"{name}: {' '.join(str(error).split())}")


def _study(
    name: str,
    study: Callable[..., Found],
    subject: Run | Sequence[Run],
    arguments: argparse.Namespace,
    folder: Path,
    summary: dict[str, Any],
) -> None:
    """Runs a study of one or several runs, writes its findings, prints its table, and adds it to the summary."""
    found = study(subject, arguments)
    table = study_table(name, found.summary)
    write_study(folder, name, found.asked, found.summary, found.records, table)
    found.draw(folder)
    whose = f"{subject.name}: " if isinstance(subject, Run) else ""
    print(f"\n{whose}{name}\n\n{table}")
    summary[name] = {"asked": found.asked, "summary": found.summary}


def _ablations(
    run: Run, names: Sequence[str], arguments: argparse.Namespace, folder: Path, summary: dict[str, Any]
) -> None:
    summary.update(ablations.ablate(run, names, arguments, folder))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m efx_jax.analysis", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders that train.py has written")
    add(
        "--what",
        nargs="+",
        choices=("all", *ANALYSES),
        default=list(ablations.NAMES),
        help=f"which analyses; all: what each run allows; default: {' '.join(ablations.NAMES)}, of dense runs",
    )
    add("--output", default="runs/analysis", metavar="DIR", help="writes into DIR, and DIR/NAME of every run")
    add("--summary", default="", metavar="FILE", help="writes the summaries of all that is found, as one JSON")
    add(
        "--steps",
        nargs="+",
        type=whole_number,
        default=[],
        help="checkpoints; 0: the base; default: 0 and every dense one, or the last where one is looked at",
    )
    add("--domains", nargs="+", default=[], help="subspaces, mask_runs: one for every run; default: by its data")
    add("--layers", type=whole_number, default=8, help="so many layers, evenly spaced; 0: all")
    add("--sparsity", type=float, default=0.5, help="of the ablations' masks; default: 0.5")
    add("--group", default="bounded", help="score_error: entries that compete; default: bounded")
    add("--bound", type=float, default=0.2, help="of the group bounded; default: 0.2")
    add("--rows", type=positive_number, default=8, help="training sequences looked at; default: 8")
    add("--length", type=positive_number, default=256, help="most tokens of each; default: 256")
    add("--entries", type=whole_number, default=64, help="score_error: single entries removed of every matrix; 0: none")
    add("--loss-rows", type=whole_number, default=4, help="score_error: rows of the loss, the longest part; default: 4")
    add("--seed", type=whole_number, default=0, help="draws the single entries")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Refuses masks that no matrix can have, and figures that cannot be drawn, before any long computation."""
    require_matplotlib()
    for group in ("bounded", arguments.group):
        # A width that every pattern divides; whether a pattern divides the model's widths is checked once it is read.
        selection_counts((1, 2520), arguments.sparsity, group, arguments.bound)


def _open_all(folders: Sequence[str]) -> list[Run]:
    runs = [open_run(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: expected runs of different names, found two; analyse them one by one")
    return runs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
