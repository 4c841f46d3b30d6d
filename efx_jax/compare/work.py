"""The work of one cell: a run, and what is measured on its export. What is already finished is not done again."""

import dataclasses
import sys
import time
from pathlib import Path

from efx_jax.compare.grid import Cell, run_name, short_hash
from efx_jax.compare.process import call, last_words
from efx_jax.compare.settings import Comparison
from efx_jax.config_io import to_yaml
from efx_jax.errors import InputError
from efx_jax.files import atomic_write
from efx_jax.training.run import refuse_other_run
from efx_jax.training.start import unpruned


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One call of `python -m efx_jax.evaluation`: `name` is a protocol, or the name of the perplexity text."""

    name: str
    is_text: bool
    flags: tuple[str, ...]

    def folder(self, run: Path) -> Path:
        """Where a run keeps the results for exactly these flags."""
        return run / "evaluations" / f"{self.name}-{short_hash(self.flags)}"


def measurements(comparison: Comparison, cell: Cell) -> list[Measurement]:
    """What a cell is measured on: every text, and all tasks under every protocol."""
    asked = comparison.evaluate
    shared = ("--batch-size", str(asked.batch_size), "--compute-dtype", cell.config.model.compute_dtype)
    found = []
    for name, source in comparison.texts.items():
        sizes = ("--text-tokens", str(asked.text_tokens), "--window", str(asked.window))
        found.append(Measurement(name, True, ("--text", source, *sizes, *shared)))
    for protocol in asked.protocols if asked.tasks else ():
        answers = ("--protocol", protocol, *(("--runs", str(asked.runs)) if protocol == "sampled" else ()))
        flags = ("--tasks", *asked.tasks, "--rows", str(asked.rows), *answers, *shared)
        found.append(Measurement(protocol, False, flags))
    return found


def finish(comparison: Comparison, cell: Cell, runs: Path) -> str:
    """Trains and measures whatever a cell still lacks, each step in its own process.

    Args:
        comparison: defines what is measured.
        cell: a cell that is not refused.
        runs: the folder of all run folders.

    Returns:
        Why something has failed, in one line, or "". A failed measurement does not prevent the others.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the running process has saved its progress.
    """
    run = runs / cell.run
    try:
        refuse_other_run(cell.config, run)
    except InputError as error:
        return str(error)
    if not is_finished(run):
        settings = runs / f"{cell.run}.yaml"
        atomic_write(settings, to_yaml(cell.config))
        _say(f"{cell.title}: training in {run}")
        trunk = runs / run_name(unpruned(cell.config))
        paths = [settings, run, trunk] if is_finished(trunk) else [settings, run]
        reason = _call("efx_jax.compare.train_one", [str(path) for path in paths], runs / f"{cell.run}.log")
        if reason:
            return reason
    reasons = []
    for asked in measurements(comparison, cell):
        folder = asked.folder(run)
        if not is_finished(folder):
            _say(f"{cell.title}: measuring {asked.name}")
            flags = [str(run), *asked.flags, "--output", str(folder)]
            reason = _call("efx_jax.evaluation", flags, folder.with_name(f"{folder.name}.log"))
            reasons += [f"{asked.name}: {reason}"] if reason else []
    return "; ".join(reasons)


def is_finished(folder: Path) -> bool:
    """Whether a run or an evaluation is complete: the summary is the last file that it writes."""
    return (folder / "summary.json").is_file()


def _call(module: str, arguments: list[str], log: Path) -> str:
    """Why the process has failed, or ""."""
    start = time.monotonic()
    try:
        code = call(module, arguments, log)
    except InputError as error:
        return str(error)
    if code:
        return last_words(log, code)
    _say(f"  done in {time.monotonic() - start:.0f} s")
    return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
