"""A torch module run again, alone, on inputs on which both sides agree.

While it runs, each operation of its own code can be replaced, and so can each call of a module
inside it. Operations within modules that agree with their counterparts are not its own.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from parity.frameworks.capture import named_leaves
from parity.frameworks.torch.leaves import to_numpy

Operation = Callable[..., Any]
# (place among the module's own operations, operation) to its replacement; None to keep it.
Change = Callable[[int, Operation], Operation | None]
# (path, submodule, args, kwargs, output) of a call to its replaced output; None to keep it.
Exchange = Callable[[str, torch.nn.Module, tuple, dict, object], object]


@dataclasses.dataclass(frozen=True)
class Changed:
    """What is changed while a module is run again, and its description.

    Attributes:
        words: the description.
        change: of operations.
        exchange: of calls of modules.
        weights: in place of those of the module, by name.
        inside: the innermost module in which an operation is changed; None for the module itself.
    """

    words: str
    change: Change = lambda place, operation: None
    exchange: Exchange = lambda path, module, args, kwargs, output: None
    weights: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    inside: torch.nn.Module | None = None


_SILENT = {"__get__", "__set__", "_set_grad_enabled"}
_CAUSES = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PARITY = os.path.dirname(os.path.dirname(os.path.dirname(_CAUSES))) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclasses.dataclass(frozen=True)
class Done:
    """One operation of a module's own code, as torch calls it."""

    operation: Operation
    args: tuple
    kwargs: dict[str, Any]
    line: str  # file and line of the call; "" inside of torch
    result: Any
    inside: torch.nn.Module | None = None  # the innermost module that is running

    @property
    def name(self) -> str:
        """Name of the operation, without underscores around it."""
        return name_of(self.operation)


class Replay:
    """One call of a module that can be repeated, up to the first output of an observed one in it.

    Agreeing modules, by path, are inside it, and their operations are not its own. Of a nested
    output, the array at the path `leaf` counts; the first if it has none there.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        args: tuple,
        kwargs: Mapping[str, object],
        agreeing: Mapping[str, torch.nn.Module],
        observed: torch.nn.Module | None = None,
        leaf: str = "",
    ):
        self.module, self.agreeing, self._observed, self._leaf = module, agreeing, observed, leaf
        self._call = args, dict(kwargs)

    def leaf_of(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return the array that counts among those of an output."""
        return arrays.get(self._leaf, next(iter(arrays.values()), None))

    def output(self, changed: Changed | None = None) -> np.ndarray | None:
        """Return the output's array with this changed; None if the module raises."""
        return self.leaf_of(self.outputs(changed))

    def outputs(self, changed: Changed | None = None) -> dict[str, np.ndarray]:
        """Return the output's arrays by path with this changed; none if the module raises."""
        leaves = named_leaves(self.run(changed))
        return {path: to_numpy(x) for path, x in leaves if isinstance(x, torch.Tensor)}

    def run(self, changed: Changed | None = None) -> object:
        """Return the output with this changed; None if the module raises."""
        made = changed or Changed("nothing")
        with torch.no_grad(), Watch(made.change) as watch, self._hooked(watch, made.exchange):
            try:
                with _flat_weights(self.module, made.weights):
                    return functional_call(self.module, dict(made.weights), *self._call)
            except _Observed as seen:
                return seen.output
            except Exception:  # shapes that do not fit, say: then it was not that
                return None

    def operations(self) -> list[Done]:
        """Return the module's own operations, in order."""
        seen: list[Done] = []
        running: list[torch.nn.Module] = []

        def look(_: int, operation: Operation) -> Operation:
            line = place_of_caller()[1]

            def watched(*args: object, **kwargs: object) -> object:
                inside = running[-1] if running else None
                result = operation(*args, **kwargs)
                seen.append(Done(operation, args, kwargs, line, result, inside))
                return result

            return watched

        def left(*_: object) -> None:
            running.pop()

        with contextlib.ExitStack() as hooks:
            enter = torch.nn.modules.module.register_module_forward_pre_hook
            leave = torch.nn.modules.module.register_module_forward_hook
            hooks.enter_context(enter(lambda module, _: running.append(module)))
            hooks.enter_context(leave(left, always_call=True))
            self.run(Changed("nothing", look))
        return seen

    def submodule_calls(self) -> list[tuple[str, tuple, object]]:
        """Return path, arguments and output of each call of an agreeing module, in order."""
        seen = []

        def look(path: str, _: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            seen.append((path, args, output))

        self.run(Changed("nothing", exchange=look))
        return seen

    @contextlib.contextmanager
    def _hooked(self, watch: "Watch", exchange: Exchange) -> Iterator[None]:
        """Watch no operation while an agreeing module runs."""

        def enter(*_: object) -> None:
            watch.depth += 1

        def observe(module, args, output):
            raise _Observed(output)

        with contextlib.ExitStack() as hooks:
            for path, submodule in self.agreeing.items():

                def leave(*call, path=path):
                    # Its depth is kept meanwhile: what an exchange runs is no operation of its own.
                    replaced = exchange(path, *call) if watch.depth == 1 else None
                    watch.depth -= 1
                    return replaced

                hooks.enter_context(submodule.register_forward_pre_hook(enter))
                hooks.enter_context(submodule.register_forward_hook(leave, with_kwargs=True))
            if self._observed is not None:
                hooks.enter_context(self._observed.register_forward_hook(observe))
            yield


@contextlib.contextmanager
def _flat_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give recurrent layers other weights, of which they keep a list of their own."""
    layers = [(x, m) for x, m in module.named_modules() if isinstance(m, torch.nn.RNNBase)]
    kept = [(layer, layer._flat_weights) for _, layer in layers if weights]
    for path, layer in layers if weights else ():
        names = (f"{path}.{name}" if path else name for name in layer._flat_weights_names)
        pairs = zip(names, layer._flat_weights, strict=True)
        layer._flat_weights = [weights.get(name, held) for name, held in pairs]
    try:
        yield
    finally:
        for layer, held in kept:
            layer._flat_weights = held


class _Observed(BaseException):
    """The observed module has its output, and nothing else is wanted."""

    def __init__(self, output: object):
        self.output = output


class Watch(TorchFunctionMode):
    """While entered, passes every operation to `change`, unless `depth` is set."""

    def __init__(self, change: Change):
        super().__init__()
        self._change, self._place, self.depth = change, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.depth or getattr(func, "__name__", "") in _SILENT:
            return func(*args, **kwargs)
        place, self._place = self._place, self._place + 1
        return (self._change(place, func) or func)(*args, **kwargs)


def name_of(operation: Operation) -> str:
    """Return an operation's name, without underscores around it."""
    return getattr(operation, "__name__", "").strip("_")


def named(words: str, operation: Operation, line: str | None = None) -> str:
    """Describe an operation: words, its name, and its line, which is the present one if None."""
    line = place_of_caller()[1] if line is None else line
    return f"{words} ({name_of(operation)}{', ' if line else ''}{line})"


def place_of_caller() -> tuple[tuple[CodeType, int] | None, str]:
    """Return the instruction outside of torch and parity that called an operation, and its line.

    Returns:
        None and "" where there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_PARITY, _TORCH)):
            place = frame.f_code, frame.f_lasti
            return place, f"{os.path.basename(name)}:{frame.f_lineno}"
        if frame.f_code is Replay.run.__code__ or (
            name.startswith(_PARITY) and not name.startswith(_CAUSES)
        ):
            break
        frame = frame.f_back
    return None, ""
