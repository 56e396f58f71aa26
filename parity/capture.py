"""Module inputs and outputs, captured from outside: the models know nothing of it.

A trace goes to a sink as soon as its module is done, so that nothing has to be kept. `in_step` runs
several captures side by side, each as far as the reader asks.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from parity.leaves import dotted, to_numpy


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


Sink = Callable[[Trace], None]


def capture_torch(module: torch.nn.Module, call: Callable[[], Any], sink: Sink) -> None:
    """Runs `call` and tells what every submodule took and gave, in order of completion."""

    def hook(path: str):
        def record(_, inputs: tuple, keywords: dict, output: Any) -> None:
            _tell(sink, path, (inputs, keywords), output, torch.Tensor, to_numpy)

        return record

    handles = [
        submodule.register_forward_hook(hook(path), with_kwargs=True)
        for path, submodule in module.named_modules()
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()


def capture_flax(module: nnx.Module, call: Callable[[], Any], sink: Sink) -> None:
    """Runs `call` and tells what every submodule took and gave, in order of completion."""
    paths: dict[int, str] = {}
    known: list[nnx.Module] = []  # keeps what is in paths alive, since ids are used again
    running: set[int] = set()

    def learn(root: nnx.Module) -> None:
        for path, submodule in nnx.iter_modules(root):
            paths[id(submodule)] = dotted(path)
            known.append(submodule)

    def record(self: nnx.Module, inputs: tuple, output: Any) -> None:
        _tell(sink, paths[id(self)], inputs, output, jax.Array, np.asarray)

    learn(module)
    classes = {type(submodule) for submodule in known}
    with _wrapped_calls(classes, type(module), learn, paths, running, record):
        call()


@contextlib.contextmanager
def in_step(*captures: Callable[[Sink], None]) -> Iterator[list[Iterator[Trace]]]:
    """The traces of captures that run side by side, each in a thread of its own.

    A capture waits until its next trace is asked for, so that no more than one of each is there;
    what is left when the block ends is given up.

    Args:
        captures: each runs one capture into the sink that it is given.
    """
    streams = [_Stream(capture) for capture in captures]
    try:
        yield [iter(stream) for stream in streams]
    finally:
        for stream in streams:
            stream.close()


class _Stream:
    """A capture that goes on when its next trace is asked for."""

    def __init__(self, capture: Callable[[Sink], None]):
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

    def _run(self, capture: Callable[[Sink], None]) -> None:
        try:
            # Of the reader's settings, the one that a thread has for itself.
            with jax.default_matmul_precision("highest"):
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


@contextlib.contextmanager
def _wrapped_calls(
    classes: set[type],
    root: type,
    learn: Callable[[nnx.Module], None],
    paths: dict[int, str],
    running: set[int],
    record: Callable,
) -> Iterator[None]:
    """Replaces `__call__` where it is defined, and puts it back whatever happens."""
    owners = {base for cls in classes for base in cls.__mro__ if "__call__" in vars(base)}
    originals = {owner: vars(owner)["__call__"] for owner in owners if owner is not object}

    def wrap(original: Callable) -> Callable:
        def __call__(self, *args, **kwargs):
            # nnx.merge makes a new model of the same type with every call of a pure function.
            if id(self) not in paths and type(self) is root and not running:
                learn(self)
            # A parent's __call__ reached through super() is not a call of its own.
            if id(self) not in paths or id(self) in running:
                return original(self, *args, **kwargs)
            running.add(id(self))
            try:
                output = original(self, *args, **kwargs)
            finally:
                running.discard(id(self))
            record(self, (args, kwargs), output)
            return output

        return __call__

    try:
        for owner, original in originals.items():
            owner.__call__ = wrap(original)
        yield
    finally:
        for owner, original in originals.items():
            owner.__call__ = original


def _tell(
    sink: Sink,
    path: str,
    inputs: tuple,
    output: Any,
    array_type: type,
    convert: Callable[[Any], np.ndarray],
) -> None:
    arrays = [x for x in leaves_of(inputs) if isinstance(x, array_type)]
    outputs = [x for x in leaves_of(output) if isinstance(x, array_type)]
    # What is traced, as in the body of a scan, has no numbers.
    if outputs and not any(isinstance(x, jax.core.Tracer) for x in (*arrays, *outputs)):
        sink(Trace(path, tuple(map(convert, arrays)), convert(outputs[0])))


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
