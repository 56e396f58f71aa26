"""A torch module alone, on inputs that both sides agree on, as often as is needed.

While it runs, each operation of its own code passes by and may be done in another way, and so may
each call of a module inside it. Operations within modules that agree with their counterparts are
not its own.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from parity.frameworks.capture import leaves_of
from parity.frameworks.torch.leaves import to_numpy

Operation = Callable[..., Any]
# Given an operation and its place among the module's own, what to do instead; None for itself.
Change = Callable[[int, Operation], Operation | None]
# Given a part's path, its call and what it gave, what it shall have given; None for that.
Exchange = Callable[[str, torch.nn.Module, tuple, dict, Any], Any]

_SILENT = {"__get__", "__set__", "_set_grad_enabled"}
_HERE = str(Path(__file__).parents[2]) + os.sep


@dataclasses.dataclass(frozen=True)
class Done:
    """One operation of a module's own code.

    Attributes:
        operation: as torch calls it.
        args: what it was given.
        kwargs: by name.
        line: file and line that asked for it; "" inside of torch.
        result: what it gave.
    """

    operation: Operation
    args: tuple
    kwargs: dict[str, Any]
    line: str
    result: Any

    @property
    def name(self) -> str:
        """The operation's, without underscores around it."""
        return getattr(self.operation, "__name__", "").strip("_")


class Replay:
    """One call of one module, to be made again.

    Args:
        module: the one to run.
        args: of the call.
        kwargs: of the call.
        agreeing: modules inside it, by path, whose operations are not its own.
        observed: the module inside it whose first output is looked at; itself when None.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        args: tuple,
        kwargs: Mapping[str, Any],
        agreeing: Mapping[str, torch.nn.Module],
        observed: torch.nn.Module | None = None,
    ):
        self.module = module
        self.agreeing = agreeing
        self._args, self._kwargs, self._observed = args, kwargs, observed

    def output(
        self,
        change: Change = lambda place, operation: None,
        exchange: Exchange = lambda path, part, args, kwargs, given: None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> np.ndarray | None:
        """The first array of what comes out; None if what is tried cannot be done.

        Args:
            change: what is done in another way.
            exchange: what parts shall have given.
            weights: parameters to use instead of the module's own, by name.
        """
        with torch.no_grad(), _Watch(change) as watch, self._hooked(watch, exchange):
            try:
                given = torch.func.functional_call(
                    self.module, dict(weights or {}), self._args, dict(self._kwargs)
                )
            except _Observed as seen:
                given = seen.output
            except Exception:  # shapes that do not fit, say: then it was not that
                return None
        arrays = [x for x in leaves_of(given) if isinstance(x, torch.Tensor)]
        return to_numpy(arrays[0]) if arrays else None

    def operations(self) -> list[Done]:
        """The module's own operations, in order."""
        seen = []

        def look(place: int, operation: Operation) -> Operation:
            line = _line_of_caller()

            def watched(*args: Any, **kwargs: Any) -> Any:
                result = operation(*args, **kwargs)
                seen.append(Done(operation, args, kwargs, line, result))
                return result

            return watched

        self.output(look)
        return seen

    def parts(self) -> list[tuple[str, tuple, Any]]:
        """Path, arguments and output of each call of an agreeing module, in order."""
        seen = []

        def look(path: str, part: torch.nn.Module, args: tuple, kwargs: dict, given: Any) -> None:
            seen.append((path, args, given))

        self.output(exchange=look)
        return seen

    @contextlib.contextmanager
    def _hooked(self, watch: "_Watch", exchange: Exchange) -> Iterator[None]:
        """While an agreeing module runs, nothing is watched."""
        handles = []

        def enter(*_: Any) -> None:
            watch.depth += 1

        for path, part in self.agreeing.items():

            def leave(part, args, kwargs, given, path=path):
                watch.depth -= 1
                if watch.depth == 0:
                    watch.depth += 1  # what is exchanged is no operation of the module
                    try:
                        return exchange(path, part, args, kwargs, given)
                    finally:
                        watch.depth -= 1
                return None

            handles.append(part.register_forward_pre_hook(enter))
            handles.append(part.register_forward_hook(leave, with_kwargs=True))
        if self._observed is not None:

            def observe(module, args, given):
                raise _Observed(given)

            handles.append(self._observed.register_forward_hook(observe))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Observed(BaseException):
    """The output of the observed module is there, and nothing else is wanted."""

    def __init__(self, output: Any):
        self.output = output


class _Watch(TorchFunctionMode):
    def __init__(self, change: Change):
        super().__init__()
        self._change, self._place, self.depth = change, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.depth or getattr(func, "__name__", "") in _SILENT:
            return func(*args, **kwargs)
        place, self._place = self._place, self._place + 1
        return (self._change(place, func) or func)(*args, **kwargs)


@contextlib.contextmanager
def watched(change: Change) -> Iterator[None]:
    """Every operation of the block passes by, and may be done in another way."""
    with _Watch(change):
        yield


def named(words: str, operation: Operation, line: str | None = None) -> str:
    """Words with the operation and the line that they are about; the line of the caller if None."""
    line = _line_of_caller() if line is None else line
    name = getattr(operation, "__name__", "").strip("_")
    return f"{words} ({name}{', ' if line else ''}{line})"


def _line_of_caller() -> str:
    return place_of_caller()[1]


def place_of_caller() -> tuple[tuple[CodeType, int] | None, str]:
    """The instruction that asked for an operation, outside of torch and of parity; None if none.

    Returns:
        It, and its file and line in words.
    """
    frame = sys._getframe(1)
    torch_folder = os.path.dirname(torch.__file__) + os.sep
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_HERE, torch_folder)):
            place = frame.f_code, frame.f_lasti
            return place, f"{os.path.basename(name)}:{frame.f_lineno}"
        if name.startswith(_HERE) and not name.startswith(os.path.join(_HERE, "check", "causes")):
            return None, ""
        frame = frame.f_back
    return None, ""
