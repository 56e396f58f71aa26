"""Module inputs and outputs, captured from outside: the models know nothing of it.

A trace is passed on as soon as its module is done, so that nothing has to be kept. `lockstep` runs
several captures side by side, each as far as the reader asks.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trace:
    """One call of one module.

    Attributes:
        path: the module's place in the model, "" for the model itself.
        inputs: its array arguments.
        output: its output, or the first array of it.
    """

    path: str
    inputs: tuple[np.ndarray, ...]
    output: np.ndarray


@dataclasses.dataclass(frozen=True)
class Backward:
    """What one call of one module passed back: gradients of a loss.

    Attributes:
        path: the module's place in the model, "" for the model itself.
        inputs: by its arguments that are floats, through this call alone.
        output: by its output or the first float of it, through all that reads it; None without one.
    """

    path: str
    inputs: tuple[np.ndarray, ...]
    output: np.ndarray | None


OnTrace = Callable[[Trace], None]


@contextlib.contextmanager
def lockstep(*captures: Callable[[OnTrace], None]) -> Iterator[list[Iterator[Trace]]]:
    """The traces of captures that run side by side, each in a thread of its own.

    A capture waits until its next trace is asked for, so that no more than one of each is there;
    what is left when the block ends is given up.

    Args:
        captures: each runs one capture into the on_trace that it is given.
    """
    streams = [_Stream(capture) for capture in captures]
    try:
        yield [iter(stream) for stream in streams]
    finally:
        for stream in streams:
            stream.close()


class _Stream:
    """A capture that goes on when its next trace is asked for."""

    def __init__(self, capture: Callable[[OnTrace], None]):
        self._asked: queue.Queue[bool] = queue.Queue()
        self._given: queue.Queue[Trace | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(capture,), daemon=True)
        self._started = False

    def __iter__(self) -> Iterator[Trace]:
        while True:
            self._asked.put(True)
            if not self._started:
                self._started = True
                self._thread.start()
            trace = self._given.get()
            if trace is None:
                if self._error is not None:
                    raise self._error
                return
            yield trace

    def close(self) -> None:
        """Ends the capture, wherever it is, and waits until what it changed is put back."""
        if self._started:
            self._asked.put(False)
            self._thread.join()

    def _run(self, capture: Callable[[OnTrace], None]) -> None:
        try:
            capture(self._give)
        except _Enough:
            pass
        except BaseException as error:  # the reader's thread raises it
            self._error = error
        finally:
            self._given.put(None)

    def _give(self, trace: Trace) -> None:
        if not self._asked.get():
            raise _Enough
        self._given.put(trace)


class _Enough(BaseException):
    """Ends a capture of which no more is wanted; no model that catches errors swallows it."""


def emit(
    on_trace: OnTrace,
    path: str,
    inputs: tuple,
    output: Any,
    array_type: type,
    convert: Callable[[Any], np.ndarray],
) -> None:
    """Pass a module call to `on_trace` as a `Trace`, if its output contains an array."""
    arrays = [x for x in leaves_of(inputs) if isinstance(x, array_type)]
    outputs = [x for x in leaves_of(output) if isinstance(x, array_type)]
    if outputs:
        on_trace(Trace(path, tuple(map(convert, arrays)), convert(outputs[0])))


def leaves_of(value: Any) -> Iterator[Any]:
    """What a call takes or gives, opened up to its arrays; keywords come sorted by name."""
    if isinstance(value, tuple | list):
        children = value
    elif isinstance(value, Mapping):
        children = [value[key] for key in sorted(value, key=str)]
    else:
        yield value
        return
    for child in children:
        yield from leaves_of(child)
