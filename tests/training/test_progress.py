"""A run's progress fits a terminal of 80 columns whole, and is plain lines where there is no terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from efx_jax.training.progress import progress

ROW = {"loss": 12.345, "tokens_per_second": 123456.0, "sparsity": 0.4}


def shown(columns: int, start: int, steps: int) -> str:
    """What a terminal of so many columns gets of one step, an event and another step."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    got: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(master, 4096):
                got.append(data)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream, progress(start, steps, stream) as bar:
        bar.step(ROW | {"step": start + 1}, True)
        bar.phase("evaluate dense")
        bar.phase("train")
        bar.step(ROW | {"step": start + 2}, False)
    reader.join(timeout=10)
    os.close(master)
    return b"".join(got).decode()


@pytest.mark.parametrize(("columns", "start", "steps"), [(80, 0, 2), (80, 99_997, 100_000), (200, 0, 2)])
def test_a_terminal_of_80_columns_shows_the_whole_line(columns: int, start: int, steps: int) -> None:
    text = shown(columns, start, steps)
    states = [state.rstrip() for state in re.split(r"[\r\n]", text) if state.strip()]
    assert max(map(len, states)) <= 80
    assert "\x1b" not in text
    steps_shown = [state for state in states if "zeros" in state]
    assert steps_shown and all(state.endswith("loss 12.345, 123k tok/s, 40% zeros") for state in steps_shown)
    assert steps_shown[-1].startswith(f"train {start + 2}/{steps}|")
    assert any(re.match(r"evaluate dense .*\|.*\| .*<", state) for state in states)


def test_a_narrow_terminal_breaks_no_line() -> None:
    assert max(map(len, re.split(r"[\r\n]", shown(60, 0, 2)))) < 60


def test_what_is_no_terminal_gets_a_plain_line_per_logged_step_and_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, 14) as bar:
        for step in (11, 12):
            bar.step(ROW | {"step": step}, step % 2 == 0)
        bar.phase("prune")
        bar.phase("train")
        bar.step(ROW | {"step": 13, "tokens_per_second": 73.4}, False)
        bar.step(ROW | {"step": 14, "tokens_per_second": 73.4}, True)
    said = capsys.readouterr().err
    first, second, third = said.splitlines()
    assert re.fullmatch(r"train 12/14 \d\d:\d\d<\d\d:\d\d, loss 12\.345, 123k tok/s, 40% zeros", first)
    assert second == "prune ..."
    assert re.fullmatch(r"train 14/14 \d\d:\d\d<00:00, loss 12\.345, 73 tok/s, 40% zeros", third)
    assert "\r" not in said and "\x1b" not in said and max(map(len, said.splitlines())) <= 80


def test_a_terminal_without_carriage_returns_gets_lines_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dumb(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    with progress(0, 1, Dumb()) as bar:
        bar.step(ROW | {"step": 1}, True)
    monkeypatch.setattr(sys, "stderr", stream := Dumb())
    with progress(0, 1) as bar:
        bar.step(ROW | {"step": 1}, True)
    assert stream.getvalue().startswith("train 1/1 ") and "\r" not in stream.getvalue()
