"""`python -m efx_jax.compare --config FILE`: trains what is missing of a grid of runs, measures it, writes a table."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from efx_jax.compare.figures import draw_figures
from efx_jax.compare.grid import Cell, choose_cells, list_cells
from efx_jax.compare.plan import flattered_texts, plan_lines, uneven_training
from efx_jax.compare.records import CellRecord, read_record
from efx_jax.compare.settings import Comparison, read_comparison
from efx_jax.compare.table import write_tables
from efx_jax.compare.work import finish
from efx_jax.errors import OneLineParser, exit_code
from efx_jax.files import refuse_unwritable


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 if a run has failed, 2 for bad input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _run(arguments), "error", "interrupted; the same command goes on from there")


def _run(arguments: argparse.Namespace) -> int:
    comparison = read_comparison(Path(arguments.config))
    cells = list_cells(comparison)
    chosen = choose_cells(cells, arguments.only)
    output = Path(arguments.output)
    # All cells are checked, not just the chosen ones, since they share one table.
    for told in (uneven_training(cells), *flattered_texts(comparison, cells)):
        if told:
            print(f"warning: {comparison.name}: {told}", file=sys.stderr)
    if arguments.dry_run:
        print("\n".join(plan_lines(comparison, chosen, output / "runs")))
        return 0
    refuse_unwritable(output)
    return _work(comparison, cells, chosen, output)


def _work(comparison: Comparison, cells: Sequence[Cell], chosen: Sequence[Cell], output: Path) -> int:
    """Finishes the chosen cells one by one; tables and figures of all cells are rewritten after each."""
    runs, folder = output / "runs", output / comparison.name
    failures: dict[str, str] = {}
    records = {cell: read_record(comparison, cell, runs) for cell in cells}
    markdown = _write(comparison, records, failures, folder)
    for cell in chosen:
        if cell.refusal or cell.run in failures:
            continue
        reason = finish(comparison, cell, runs)
        if reason:
            failures[cell.run] = reason
            print(f"{cell.title}: failed: {reason}", file=sys.stderr)
        elif records[cell].is_whole:
            continue
        # Intervals of Rel.% take a while, so only what may have changed is reread, including by another process.
        for each in cells:
            if cell.run in (each.run, each.reference) or not records[each].is_whole or records[each].note:
                records[each] = read_record(comparison, each, runs)
        markdown = _write(comparison, records, failures, folder)
    print(markdown, end="")
    print(f"written to {folder}", file=sys.stderr)
    return 1 if any(cell.run in failures and not records[cell].is_whole for cell in chosen) else 0


def _write(
    comparison: Comparison, records: Mapping[Cell, CellRecord], failures: Mapping[str, str], folder: Path
) -> str:
    found = list(records.values())
    return write_tables(comparison, found, failures, draw_figures(comparison, found, folder / "figures"), folder)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m efx_jax.compare", description=__doc__)
    add = parser.add_argument
    add(
        "--config", required=True, metavar="FILE", help="YAML file of a comparison, such as configs/compare_health.yaml"
    )
    add("--output", default="runs/compare", metavar="DIR", help="runs in DIR/runs, tables in DIR/NAME of the file")
    add("--dry-run", action="store_true", help="list the runs, what each would need, and what is refused")
    add("--only", nargs="+", default=[], metavar="NAME", help="methods, schedules or METHOD/SCHEDULE; others wait")
    parser.epilog = "The same command again goes on where it was; runs that lie finished below DIR are used again."
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
