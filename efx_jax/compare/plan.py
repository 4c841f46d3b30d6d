"""What a comparison still has to do, without doing it: the report of `--dry-run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efx_jax.compare.grid import Cell
from efx_jax.compare.settings import Comparison
from efx_jax.compare.work import is_finished, measurements
from efx_jax.errors import InputError
from efx_jax.training.rows import calibration_texts, taught_texts
from efx_jax.training.run import refuse_other_run
from efx_jax.training.schedule import total_steps
from efx_jax.training.survey import DataCounts, RowCounts, check_shapes, count_data
from efx_jax.weights.config_json import read_json
from efx_jax.weights.shapes import find_spec

Counts = dict[Any, DataCounts | RowCounts | str]


def plan_lines(comparison: Comparison, cells: Sequence[Cell], runs: Path) -> list[str]:
    """A line per cell (done, measure, resume, train, prune, shared or refused, with its steps and tokens), and totals.

    Args:
        comparison: defines what is measured.
        cells: the cells to plan.
        runs: the folder of all run folders.

    Raises:
        InputError: malformed data, or an unknown model.
    """
    counts: Counts = {}
    states: dict[str, int] = {}
    met: dict[str, str] = {}
    lines = []
    for cell in cells:
        state, text = _plan(comparison, cell, runs, counts)
        if cell.run in met and state in ("train", "prune", "resume", "measure"):
            state, text = "shared", f"the run of {met[cell.run]}"
        met.setdefault(cell.run, cell.title)
        states[state] = states.get(state, 0) + 1
        lines.append(f"{state:<8} {cell.title}: {text}")
    return [*lines, f"{len(cells)} cells: {', '.join(f'{count} {state}' for state, count in states.items())}"]


def uneven_training(cells: Sequence[Cell]) -> str:
    """Why some of the cells would train on more tokens than others, in one line, or "".

    An epoch has the windows of `distill.text` besides the rows, and without packing a window is longer than most rows.
    """
    first: dict[float, Cell] = {}
    for cell in cells:
        train, distill = cell.config.train, cell.config.distill
        trains = not cell.refusal and (train.steps or train.epochs)
        if trains and not (train.steps and cell.config.data.batching == "packing"):
            first.setdefault(distill.text_share if taught_texts(cell.config) else 0.0, cell)
    if len(first) < 2:
        return ""
    most, least = first[max(first)], first[min(first)]
    config = most.config
    return (
        f"{most.title} trains on more tokens than {least.title}, as distill.text {config.distill.text} comes beside "
        f"its rows; expected train.steps above 0 and data.batching packing, found {config.train.steps} and "
        f"{config.data.batching}; set both in the base, and all train on as many"
    )


def flattered_texts(comparison: Comparison, cells: Sequence[Cell]) -> list[str]:
    """One line for every perplexity text that some cell calibrates on or teaches, which makes its perplexity too good.

    It is compared by name, as in a run.
    """
    told: dict[tuple[str, str], str] = {}
    for cell in (cell for cell in cells if not cell.refusal):
        uses = {"prune.calibration": calibration_texts(cell.config), "distill.text": taught_texts(cell.config)}
        for name, source in comparison.texts.items():
            for setting in (setting for setting, texts in uses.items() if source in texts):
                told.setdefault(
                    (name, setting),
                    f"evaluate.texts {name}: {source} is {setting} of {cell.title} too, whose perplexity on it is then "
                    "too good; measure on another text",
                )
    return list(told.values())


def _plan(comparison: Comparison, cell: Cell, runs: Path, counts: Counts) -> tuple[str, str]:
    """The state of a cell and the details to report."""
    run = runs / cell.run
    try:
        if cell.refusal:
            raise InputError(cell.refusal)
        refuse_other_run(cell.config, run)
        check_shapes(cell.config, find_spec(cell.config.model.path).spec)
    except InputError as error:
        return "refused", str(error)
    missing = [asked.name for asked in measurements(comparison, cell) if not is_finished(asked.folder(run))]
    if is_finished(run):
        summary = read_json(run / "summary.json")
        done = f"{summary['steps']:,} steps, {summary['tokens']:,} tokens"
        return ("measure", f"{done}; {', '.join(missing)}") if missing else ("done", done)
    if not (cell.config.train.steps or cell.config.train.epochs):
        return "prune", f"no updates; {', '.join(missing)}"
    reached = _reached(run)
    work = f"{_size(cell, counts)}; {', '.join(missing)}"
    return ("train", work) if reached is None else ("resume", f"from step {reached:,} of {work}")


def _reached(run: Path) -> int | None:
    """The step of the latest checkpoint."""
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def _size(cell: Cell, counts: Counts) -> str:
    """Steps and tokens of a run, as far as its data can be counted here; cells with the same data are counted once."""
    config = cell.config
    # The only thing that a teacher adds to the rows is its text.
    text = (config.distill.text, config.distill.text_share)
    key = (config.model, config.data, config.eval, config.seed, text)
    if key not in counts:
        counts[key] = count_data(config, find_spec(config.model.path))
    found = counts[key]
    if not isinstance(found, DataCounts):
        reason = found if isinstance(found, str) else "not counted: no tokenizer here"
        return f"{config.train.steps or f'{config.train.epochs:g} epochs in'} steps, data {reason}"
    steps = total_steps(config.train, found.epoch_rows)
    tokens = steps * config.train.batch_size * found.tokens / found.epoch_rows
    return f"{steps:,} steps, about {tokens:,.0f} tokens"
