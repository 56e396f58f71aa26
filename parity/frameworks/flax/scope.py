"""The device, and whether 64-bit types exist, as a context that jax runs in."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax

from parity.frameworks.flax.lift import Log, lifted


@contextlib.contextmanager
def jax_scope(dtype: str, device: jax.Device, log: Log | None = None) -> Iterator[None]:
    """Run jax on `device`, with 64-bit types exactly when dtype is float64; lifted with a log."""
    lift = contextlib.nullcontext() if log is None else lifted(log)
    with jax.enable_x64(dtype == "float64"), jax.default_device(device), lift:
        yield


class Scoped:
    """An object whose methods run inside a scope, which is made anew for each call."""

    def __init__(
        self, target: object, scope: Callable[[], contextlib.AbstractContextManager[None]]
    ):
        self._target, self._scope = target, scope

    def __getattr__(self, name: str) -> Any:
        with self._scope():
            found = getattr(self._target, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def scoped(*args, **kwargs):
            with self._scope():
                return found(*args, **kwargs)

        return scoped
