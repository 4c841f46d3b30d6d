"""Work in a separate process: its memory, its device and its compiled programs are released with it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from efx_jax.files import lock

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def call(module: str, arguments: Sequence[str], log: Path) -> int:
    """Runs `python -m MODULE ARGUMENTS` with all its output in `log`, and returns its exit code.

    The process has its own process group, so that it receives Ctrl-C once, forwarded from here: training then finishes
    its step and saves, and a second Ctrl-C stops it at once. Closing the terminal (SIGHUP) is forwarded as SIGTERM.

    Raises:
        InputError: another process is writing to that log, so it does the same work.
        KeyboardInterrupt: a signal asked the process to end, and it has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # In a checkout, the child must find the package where this process found it.
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    with log.open("a") as stream, _heard(hand_on):
        # The child inherits the lock, and keeps it if this process is killed.
        lock(stream.fileno(), f"{log}: another comparison is at this work; wait for it, and call this one again")
        stream.truncate(0)
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        children.append(child)
        if asked:
            # The signal came while the process was being started.
            child.terminate()
        code = child.wait()
    if asked:
        raise KeyboardInterrupt
    return code


def last_words(log: Path, code: int) -> str:
    """Why a process has failed, in one line: its own error message, its last line, or the signal that killed it.

    Its own message comes first because a library's threads may still write to the log after it.
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}; see {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(own or lines or [f'exit code {code}'])[-1]}; see {log}"


@contextlib.contextmanager
def _heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Routes the signals that end a command to a handler; signals that are ignored, as under nohup, stay ignored."""
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
