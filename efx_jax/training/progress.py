"""What a user sees of a run in progress: a bar of at most 80 columns in a terminal, plain lines everywhere else."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

import jax
from tqdm import tqdm

_COLUMNS = 80
# No percentage or seconds per step: the counts and the tokens per second say the same, and 80 columns are few.
_FORMAT = "{desc} {n_fmt}/{total_fmt}|{bar}| {elapsed}<{remaining}{postfix}"


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """`phase(name)` shows what the run is doing; `step(row, is_logged)` that a step is done, with its metrics."""

    phase: Callable[[str], None]
    step: Callable[[Mapping[str, float], bool], None]


@contextlib.contextmanager
def progress(start: int, steps: int, stream: TextIO | None = None) -> Iterator[Progress]:
    """Shows the steps after `start` on a stream, stderr by default; only in the first of several processes.

    A terminal gets one line that is updated. Any other stream, or a terminal without carriage returns (TERM=dumb),
    gets a line for every logged step and every phase, without carriage returns and escape codes.
    """
    stream = sys.stderr if stream is None else stream
    if jax.process_index() != 0:
        yield Progress(lambda name: None, lambda row, is_logged: None)
    elif stream.isatty() and os.environ.get("TERM") != "dumb":
        width = _width(stream)
        with tqdm(
            total=steps, initial=start, desc="train", bar_format=_FORMAT, ncols=width, smoothing=0.1, file=stream
        ) as bar:
            yield _on_bar(bar, stream)
    else:
        yield _in_lines(start, steps, stream)


def _width(stream: TextIO) -> int:
    """Width of a line that no terminal wraps: the last column stays free, as some wrap once it is written."""
    try:
        return min(_COLUMNS, os.get_terminal_size(stream.fileno()).columns - 1)
    except OSError:
        return _COLUMNS - 1


def _on_bar(bar: tqdm, stream: TextIO) -> Progress:
    def phase(name: str) -> None:
        if name != "train":
            # The speed of the last step says nothing about the current phase.
            bar.set_postfix_str("", refresh=False)
        bar.ncols = _width(stream)
        bar.set_description_str(name)

    def step(row: Mapping[str, float], is_logged: bool) -> None:
        bar.set_postfix_str(_metrics(row), refresh=False)
        bar.ncols = _width(stream)
        bar.update()

    return Progress(phase, step)


def _in_lines(start: int, steps: int, stream: TextIO) -> Progress:
    began = time.monotonic()

    def phase(name: str) -> None:
        if name != "train":
            print(f"{name} ...", file=stream, flush=True)

    def step(row: Mapping[str, float], is_logged: bool) -> None:
        if is_logged:
            done, gone = int(row["step"]), time.monotonic() - began
            left = gone / max(1, done - start) * (steps - done)
            times = f"{tqdm.format_interval(gone)}<{tqdm.format_interval(left)}"
            print(f"train {done}/{steps} {times}, {_metrics(row)}", file=stream, flush=True)

    return Progress(phase, step)


def _metrics(row: Mapping[str, float]) -> str:
    loss = f"loss {row['loss']:.3f}" if "loss" in row else "no labels"
    return f"{loss}, {_short(row['tokens_per_second'])} tok/s, {row['sparsity']:.0%} zeros"


def _short(count: float) -> str:
    """A count, in thousands if it is large."""
    return f"{count:.0f}" if count < 1e4 else f"{count / 1e3:.0f}k"
