"""The guilty torch module alone, on inputs that both sides agree on, as often as is needed.

While it runs, each operation of its own code passes by and may be done in another way. Operations
of modules inside it that have a counterpart, and agree, are left alone.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from parity.capture import leaves_of
from parity.leaves import to_numpy

Operation = Callable[..., Any]
# Given an operation and its place among the module's own, what to do instead; None for itself.
Change = Callable[[int, Operation], Operation | None]


class Replay:
    """One call of one module, to be made again.

    Args:
        module: the guilty one.
        args: of the call.
        kwargs: of the call.
        agreeing: modules inside it whose operations are not its own.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        args: tuple,
        kwargs: Mapping[str, Any],
        agreeing: list[torch.nn.Module],
    ):
        self.module = module
        self._args, self._kwargs, self._agreeing = args, kwargs, agreeing

    def output(
        self,
        change: Change = lambda place, operation: None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> np.ndarray | None:
        """The first array of what it gives; None if what is tried cannot be done.

        Args:
            change: what is done in another way.
            weights: parameters to use instead of its own, by name.
        """
        with torch.no_grad(), _Watch(change) as watch, self._outside(watch):
            try:
                given = torch.func.functional_call(
                    self.module, dict(weights or {}), self._args, dict(self._kwargs)
                )
            except Exception:  # shapes that do not fit, say: then it was not that
                return None
        arrays = [x for x in leaves_of(given) if isinstance(x, torch.Tensor)]
        return to_numpy(arrays[0]) if arrays else None

    def operations(self) -> list[tuple[Operation, tuple, dict, str]]:
        """The module's own operations, in order, with their arguments and their lines of code."""
        seen = []

        def look(place: int, operation: Operation) -> Operation:
            line = _line_of_caller()

            def watched(*args: Any, **kwargs: Any) -> Any:
                seen.append((operation, args, kwargs, line))
                return operation(*args, **kwargs)

            return watched

        self.output(look)
        return seen

    @contextlib.contextmanager
    def _outside(self, watch: "_Watch") -> Iterator[None]:
        """While an agreeing module runs, nothing is watched."""

        def enter(*_: Any) -> None:
            watch.depth += 1

        def leave(*_: Any) -> None:
            watch.depth -= 1

        handles = [
            handle
            for module in self._agreeing
            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, change: Change):
        super().__init__()
        self._change, self._place, self.depth = change, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.depth or getattr(func, "__name__", "") in ("__get__", "_set_grad_enabled"):
            return func(*args, **kwargs)
        place, self._place = self._place, self._place + 1
        return (self._change(place, func) or func)(*args, **kwargs)


def _line_of_caller() -> str:
    """The file and line of the code that asked for the operation, outside of torch and of here."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name.replace("\\", "/"):
            return f"{name.replace(chr(92), '/').rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
