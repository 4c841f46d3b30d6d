"""A child process: what it prints, how it ends, and who gets Ctrl-C."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from efx_jax.compare.process import call, last_words
from efx_jax.errors import InputError

CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # a training saves then too
try:
    print("begun", sys.argv[1:], flush=True)
    if sys.argv[1] == "fail":
        sys.exit("error: out of luck\\n")
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "wait":
        time.sleep(60)
except KeyboardInterrupt:
    print("saved")
    sys.exit(130)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "child_of_a_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "logs" / "child.log"


def ask_when_begun(log: Path, *numbers: int) -> None:
    """Sends signals to this process as soon as its child is at work."""
    while "begun" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.01)
    for number in numbers:
        os.kill(os.getpid(), number)


def test_what_it_prints_is_in_the_log(log: Path) -> None:
    assert call("child_of_a_test", ["go", "on"], log) == 0
    assert log.read_text() == "begun ['go', 'on']\n"


def test_a_log_holds_the_last_attempt_alone(log: Path) -> None:
    for word in ("first", "second"):
        assert call("child_of_a_test", [word], log) == 0
    assert log.read_text() == "begun ['second']\n"


def test_the_log_of_a_process_at_work_is_left_alone(log: Path) -> None:
    assert call("child_of_a_test", ["go", "on"], log) == 0
    with log.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another comparison is at this work"):
            call("child_of_a_test", ["again"], log)
    assert log.read_text() == "begun ['go', 'on']\n"


def test_a_failure_is_told_by_its_last_line(log: Path) -> None:
    code = call("child_of_a_test", ["fail"], log)
    assert code == 1
    assert last_words(log, code) == f"out of luck; see {log}"


def test_what_a_run_has_said_itself_goes_before_what_threads_say_after_it(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("train 3/4\nerror: the disk is full\nImportError: sys.meta_path is None\n")
    assert last_words(log, 2) == f"the disk is full; see {log}"


def test_a_killed_process_is_told_by_its_signal(log: Path) -> None:
    code = call("child_of_a_test", ["die"], log)
    assert last_words(log, code) == f"killed by SIGKILL, perhaps for want of memory; see {log}"


def test_what_is_ignored_stays_ignored(log: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asking = threading.Thread(target=lambda: ask_when_begun(log, signal.SIGHUP, signal.SIGINT))
    asking.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call("child_of_a_test", ["wait"], log)
    finally:
        signal.signal(signal.SIGHUP, before)
        asking.join()
    # The hang-up would have killed it before it could save.
    assert "saved" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on_and_ends_the_caller_after_the_child(log: Path, number: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    asking = threading.Thread(target=lambda: ask_when_begun(log, number))
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        call("child_of_a_test", ["wait"], log)
    asking.join()
    assert "saved" in log.read_text()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
