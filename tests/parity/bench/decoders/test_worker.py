"""A decoder in another process: what it answers and raises, and what is said when it ends."""

import os
import time

import numpy as np
import pytest

from parity.bench.decoders.protocol import TimedTokens
from parity.bench.decoders.worker import Worker
from parity.bench.machine import Unavailable


class Counting:
    """Writes its own process and how often it was asked."""

    name, form, ran, reads_prompt, extra_weight_bytes = "it", "cached", "counts", True, 7

    def __init__(self, start: int):
        if start < 0:
            raise Unavailable("counts from 0")
        self._count = start

    def prefill(self) -> None:
        self._count += 100

    def timed_steps(self, num_steps: int) -> TimedTokens:
        if num_steps > 9:
            os._exit(3)
        self._count += num_steps
        return TimedTokens(np.array([[os.getpid(), self._count]]), 0.5)


@pytest.fixture(scope="module")
def worker():
    with Worker("json") as worker:
        yield worker


def test_decoders_live_in_the_other_process_until_they_are_cleared(worker):
    first, second = worker.make(Counting, 0), worker.make(Counting, 50)
    assert (first.name, first.form, first.reads_prompt, first.extra_weight_bytes) == (
        "it",
        "cached",
        True,
        7,
    )
    first.prefill()
    assert first.timed_steps(2).tokens_BG.tolist() == [[worker.pid, 102]]
    assert second.timed_steps(1).tokens_BG.tolist() == [[worker.pid, 51]]
    assert worker.pid != os.getpid()
    assert second.timed_steps(1).seconds == 0.5
    worker.clear()
    with pytest.raises(ValueError, match="IndexError"):
        second.timed_steps(1)


def test_what_is_raised_there_is_raised_here_and_the_process_goes_on(worker):
    with pytest.raises(Unavailable, match="counts from 0"):
        worker.make(Counting, -1)
    assert worker.make(Counting, 3).timed_steps(1).tokens_BG[0, 1] == 4


def test_a_process_that_ends_is_named_with_its_exit_code_and_nothing_hangs():
    with Worker("json") as worker:
        decoder = worker.make(Counting, 0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"process of json ended .* code 3\..*--without"):
                decoder.timed_steps(10)


def sleep_on(decoders) -> None:
    time.sleep(600)


def test_leaving_ends_a_process_that_is_busy():
    start = time.monotonic()
    with Worker("json") as worker:
        worker.send(sleep_on)
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
