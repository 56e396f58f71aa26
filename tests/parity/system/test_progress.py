"""Interrupts are neither lost nor left behind."""

import contextlib
import signal

import pytest

from parity.system.progress import interruptible, stoppable


def test_an_interrupt_that_python_drops_is_raised_at_the_next_progress():
    before = signal.getsignal(signal.SIGINT)
    with interruptible(lambda level, fraction: None) as progress:
        progress("weights", 0.5)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress("weights", 0.6)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_first_interrupt_asks_to_stop_and_the_second_stops():
    before = signal.getsignal(signal.SIGINT)
    with stoppable() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
