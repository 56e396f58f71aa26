"""What goes into and comes out of every submodule of a Flax NNX module, seen from outside.

Read beside parity/torch_capture.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from parity.capture import Sink, leaves_of, tell
from parity.leaves import dotted


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
        # What is traced, as in the body of a scan, has no numbers.
        if not any(isinstance(x, jax.core.Tracer) for x in leaves_of((inputs, output))):
            tell(sink, paths[id(self)], inputs, output, jax.Array, np.asarray)

    learn(module)
    classes = {type(submodule) for submodule in known}
    with _wrapped_calls(classes, type(module), learn, paths, running, record):
        call()


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
