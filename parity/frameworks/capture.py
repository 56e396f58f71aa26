"""Inputs and outputs of modules, captured from outside: the models need no change for it.

A trace is passed on as soon as its module is done, so that none has to be kept. `lockstep` runs
several captures side by side, each as far as the reader asks.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import TypeVar, cast

import numpy as np

ArrayT = TypeVar("ArrayT")
ValueT = TypeVar("ValueT")


@dataclasses.dataclass(frozen=True)
class Trace:
    """One call of one module.

    Attributes:
        path: of the module, "" for the model itself.
        inputs: the array arguments.
        output: the output, or the first array in it.
        outputs: all arrays of a nested output, by their paths in it.
    """

    path: str
    inputs: tuple[np.ndarray, ...]
    output: np.ndarray
    outputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Backward:
    """Gradients of a loss at one call of one module.

    Attributes:
        path: of the module, "" for the model itself.
        inputs: gradients by its float arguments, through this call alone.
        output: gradient by its output, or the first float in it, through all readers; None if there
            is no float.
    """

    path: str
    inputs: tuple[np.ndarray, ...]
    output: np.ndarray | None


OnTrace = Callable[[Trace], None]


@contextlib.contextmanager
def lockstep(*captures: Callable[[OnTrace], None]) -> Iterator[list[Iterator[Trace]]]:
    """Yield an iterator of traces for each of several captures, which run in threads.

    A capture, which runs with the `on_trace` that it is given, waits until its next trace is asked
    for, so that at most one trace of each exists. Leaving the block ends all captures.
    """
    streams = [_traces(capture) for capture in captures]
    try:
        yield list(streams)
    finally:
        for stream in streams:
            stream.close()


def _traces(capture: Callable[[OnTrace], None]) -> Generator[Trace, None, None]:
    """Yield the traces of a capture, whose thread goes on when the next one is asked for."""
    asked: queue.Queue[bool] = queue.Queue()
    given: queue.Queue[Trace | BaseException | None] = queue.Queue()

    def give(trace: Trace) -> None:
        if not asked.get():
            raise _Enough
        given.put(trace)

    def run() -> None:
        try:
            capture(give)
        except BaseException as error:  # the reader's thread raises it
            given.put(error)
        else:
            given.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            asked.put(True)
            found = given.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:  # wait until the capture has restored the model
        asked.put(False)
        thread.join()


class _Enough(BaseException):
    """Ends a capture; a BaseException, so that a model that catches errors lets it through."""


def emit(
    on_trace: OnTrace,
    path: str,
    inputs: object,
    output: object,
    array_type: type[ArrayT],
    convert: Callable[[ArrayT], np.ndarray],
) -> None:
    """Pass a module call to `on_trace` as a `Trace`, if its output contains an array."""
    arrays = [x for x in leaves_of(inputs) if isinstance(x, array_type)]
    outputs = {path: convert(x) for path, x in named_leaves(output) if isinstance(x, array_type)}
    if outputs:
        on_trace(Trace(path, tuple(map(convert, arrays)), next(iter(outputs.values())), outputs))


def leaves_of(value: object) -> Iterator[object]:
    """Yield what nested tuples, lists and mappings hold; keys are taken in order."""
    for _, leaf in named_leaves(value, data_classes=False):
        yield leaf


def named_leaves(
    value: object, path: str = "", data_classes: bool = True
) -> Iterator[tuple[str, object]]:
    """Yield path and value of each leaf, of data classes too, whose fields are taken as declared.

    Those among the inputs stay closed: what one model passes on as an object, as a mask with its
    positions, the other one computes where it needs it.
    """
    children: Iterable[tuple[object, object]]
    if isinstance(value, tuple | list):
        children = enumerate(value)
    elif isinstance(value, Mapping):
        children = [(key, value[key]) for key in sorted(value, key=str)]
    elif data_classes and dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        children = [(x.name, getattr(value, x.name)) for x in fields]
    else:
        yield path, value
        return
    for key, child in children:
        yield from named_leaves(child, f"{path}.{key}" if path else str(key), data_classes)


def map_leaves(value: ValueT, change: Callable[[object], object]) -> ValueT:
    """Apply `change` to what nested tuples, lists and dicts hold; other containers stay."""
    mapped: object
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        mapped = type(value)(map_leaves(x, change) for x in value)
    elif isinstance(value, dict) and type(value) is dict:
        mapped = {key: map_leaves(x, change) for key, x in value.items()}
    else:
        mapped = change(value)
    return cast(ValueT, mapped)
