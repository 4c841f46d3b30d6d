"""Work in a process of its own: its memory, its device and its compiled programs go with it."""

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
    """Runs `python -m MODULE ARGUMENTS` from here, with all that it prints in `log`; returns its exit code.

    The process is in a group of its own, so that it gets Ctrl-C once, from here: a training then finishes its step and
    saves, and a second Ctrl-C stops it at once. A terminal that is closed asks it as SIGTERM does.

    Raises:
        InputError: another process writes into that log: it does the same work.
        KeyboardInterrupt: it has ended, and was asked to.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # From a checkout the package is found where this one was.
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    with log.open("a") as stream, _heard(hand_on):
        # The child inherits the lock, and keeps it should this process be killed.
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
            # It came while the process was being made.
            child.terminate()
        code = child.wait()
    if asked:
        raise KeyboardInterrupt
    return code


def last_words(log: Path, code: int) -> str:
    """Why a process has failed, in one line: what it said itself, its last line, or the signal that killed it.

    A library's threads may complain in the log after it has had its say.
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{', perhaps for want of memory' if name == 'SIGKILL' else ''}; see {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{(own or lines or [f'exit code {code}'])[-1]}; see {log}"


@contextlib.contextmanager
def _heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives the signals that end a command to a handler; what is ignored, as under nohup, stays so."""
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
