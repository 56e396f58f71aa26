"""Module inputs and outputs, captured from outside: the models know nothing of it."""

import contextlib
import dataclasses
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


def capture_torch(module: torch.nn.Module, call: Callable[[], Any]) -> list[Trace]:
    """Runs `call` and lists what every submodule took and gave, in order of completion."""
    traces: list[Trace] = []

    def hook(path: str):
        def record(_, inputs: tuple, keywords: dict, output: Any) -> None:
            _append(traces, path, (inputs, keywords), output, torch.Tensor, to_numpy)

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
    return traces


def capture_flax(module: nnx.Module, call: Callable[[], Any]) -> list[Trace]:
    """Runs `call` and lists what every submodule took and gave, in order of completion."""
    traces: list[Trace] = []
    paths: dict[int, str] = {}
    known: list[nnx.Module] = []  # keeps what is in paths alive, since ids are used again
    running: set[int] = set()

    def learn(root: nnx.Module) -> None:
        for path, submodule in nnx.iter_modules(root):
            paths[id(submodule)] = dotted(path)
            known.append(submodule)

    def record(self: nnx.Module, inputs: tuple, output: Any) -> None:
        _append(traces, paths[id(self)], inputs, output, jax.Array, np.asarray)

    learn(module)
    classes = {type(submodule) for submodule in known}
    with _wrapped_calls(classes, type(module), learn, paths, running, record):
        call()
    return traces


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


def _append(
    traces: list[Trace],
    path: str,
    inputs: tuple,
    output: Any,
    array_type: type,
    convert: Callable[[Any], np.ndarray],
) -> None:
    arrays = [x for x in _leaves(inputs) if isinstance(x, array_type)]
    outputs = [x for x in _leaves(output) if isinstance(x, array_type)]
    if outputs:
        traces.append(Trace(path, tuple(map(convert, arrays)), convert(outputs[0])))


def _leaves(value: Any) -> Iterator[Any]:
    """What a call takes or gives, opened up to its arrays; keywords come sorted by name."""
    if isinstance(value, tuple | list):
        children = value
    elif isinstance(value, Mapping):
        children = [value[key] for key in sorted(value, key=str)]
    else:
        yield value
        return
    for child in children:
        yield from _leaves(child)
