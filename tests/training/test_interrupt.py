"""Signals that ask a run to stop: the first is heard and waited for, the second is not."""

import os
import signal

import pytest

from efx_jax.training.interrupt import asked, interruptible

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_asks_once_and_the_next_one_ends_at_once(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in BOTH]
    with interruptible() as stop:
        assert not asked(stop)
        os.kill(os.getpid(), number)
        assert asked(stop)
        assert [signal.getsignal(each) for each in BOTH] == [signal.default_int_handler, signal.SIG_DFL]
    assert [signal.getsignal(each) for each in BOTH] == before
    again = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"{again} again stops at once" in capsys.readouterr().err
