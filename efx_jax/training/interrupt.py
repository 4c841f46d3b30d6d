"""Ctrl-C: the step at hand is finished and saved, and all hosts stop after the same one."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from efx_jax.parallel.hosts import meet


def say_interrupted(done: int, steps: int, is_saved: bool, output: Path) -> None:
    outcome = "saved" if is_saved else "nothing to save yet"
    print(
        f"interrupted after {done} of {steps} steps; {outcome}. The same command with --output {output} goes on "
        "from there.",
        file=sys.stderr,
    )


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C asks the loop to finish its step and save; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing the step and saving; Ctrl-C again stops at once", file=sys.stderr)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def asked(stop: threading.Event) -> bool:
    """Whether anybody has asked the run to stop; all hosts agree on it."""
    return any(meet(stop.is_set()))
