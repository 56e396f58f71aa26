"""Where and in how many bits jax computes, as a scope for what is run in it."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def jax_scope(dtype: str, device: jax.Device) -> Iterator[None]:
    """Runs jax on `device`, with 64-bit types exactly when dtype is float64."""
    with jax.enable_x64(dtype == "float64"), jax.default_device(device):
        yield


class Scoped:
    """An object whose methods run inside a scope."""

    def __init__(self, target: Any, scope: Callable[[], contextlib.AbstractContextManager]):
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
