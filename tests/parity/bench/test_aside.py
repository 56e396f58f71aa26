"""A contender in another process: what it answers and raises, and what is said when it ends."""

import os
import time

import numpy as np
import pytest

from parity.bench.aside import Room
from parity.bench.contenders import Turn
from parity.bench.steps import Unavailable


class Counting:
    """Writes its own process and how often it was asked."""

    name, framework, form, ran, reads, extra_bytes = "it", "none", "cached", "counts", True, 7

    def __init__(self, start: int):
        if start < 0:
            raise Unavailable("counts from 0")
        self._count = start

    def prefill(self) -> None:
        self._count += 100

    def turn(self, num_steps: int) -> Turn:
        if num_steps > 9:
            os._exit(3)
        self._count += num_steps
        return Turn(np.array([[os.getpid(), self._count]]), 0.5)


@pytest.fixture(scope="module")
def room():
    with Room("json") as room:
        yield room


def test_contenders_live_in_the_other_process_until_they_are_cleared(room):
    first, second = room.make(Counting, 0), room.make(Counting, 50)
    assert (first.name, first.form, first.reads, first.extra_bytes) == ("it", "cached", True, 7)
    first.prefill()
    assert first.turn(2).tokens_BG.tolist() == [[room.pid, 102]]
    assert second.turn(1).tokens_BG.tolist() == [[room.pid, 51]] and room.pid != os.getpid()
    assert second.turn(1).seconds == 0.5
    room.clear()
    with pytest.raises(ValueError, match="IndexError"):
        second.turn(1)


def test_what_is_raised_there_is_raised_here_and_the_process_goes_on(room):
    with pytest.raises(Unavailable, match="counts from 0"):
        room.make(Counting, -1)
    assert room.make(Counting, 3).turn(1).tokens_BG[0, 1] == 4


def test_a_process_that_ends_is_named_with_its_exit_code_and_nothing_hangs():
    with Room("json") as room:
        contender = room.make(Counting, 0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"process of json ended .* code 3\..*--without"):
                contender.turn(10)


def test_leaving_ends_a_process_that_is_busy():
    start = time.monotonic()
    with Room("json") as room:
        room._send(("make", time.sleep, 600))
    assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(room.pid, 0)
