"""Ctrl-C, or a scheduler's SIGTERM: the current step is finished and saved, and all hosts stop after the same one."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from efx_jax.parallel.hosts import meet

_AT_ONCE: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def say_interrupted(done: int, steps: int, is_saved: bool, output: Path) -> None:
    outcome = "saved" if is_saved else "nothing to save yet"
    print(
        f"interrupted after {done} of {steps} steps; {outcome}. The same command with --output {output} goes on "
        "from there.",
        file=sys.stderr,
    )


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask the loop to finish its step and save; a second one stops at once.

    Enter it after `start_hosts`: jax.distributed installs its own SIGTERM handler, which only records the signal.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each in previous:
            signal.signal(each, _AT_ONCE[each])
        again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\nfinishing the step and saving; {again} again stops at once", file=sys.stderr)

    previous = {number: signal.getsignal(number) for number in _AT_ONCE}
    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked(stop: threading.Event) -> bool:
    """Whether any host was asked to stop the run; all hosts get the same answer."""
    return any(meet(stop.is_set()))
