"""An object whose methods run inside a context, such as a device or a type of numbers."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any


class Scoped:
    """An object whose methods run inside a scope, which is made anew for each call."""

    def __init__(
        self, target: object, scope: Callable[[], contextlib.AbstractContextManager[object]]
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
