"""Find the cause of a different decode by re-running torch's decoder with one place changed.

A place of its code runs in every layer and at every token, and is changed in all of these alike.
"""

import contextlib
import dataclasses
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import NamedTuple, TypeGuard

import numpy as np
import torch

from parity.check.causes.operations import Found, alternative, alternatives, common_sizes
from parity.check.causes.replay import Done, Operation, Watch, named, place_of_caller
from parity.check.locate import float64_gap
from parity.check.pair_session import PairSession
from parity.frameworks.capture import leaves_of
from parity.frameworks.protocols import Calls
from parity.frameworks.torch.leaves import to_numpy
from parity.report import Divergence

# Spent at most on the search; the twins of the self-test take up to 16 on an idle machine.
_SECONDS = 60.0


class Place(NamedTuple):
    """Where an operation is called, the same in every layer and call."""

    name: str  # of the operation
    line: str  # file and line
    code: tuple[CodeType, int]  # the instruction
    number: int  # how often one call of a module was there before, as for queries and keys


# (operation, latest results by place, *args, **kwargs) to the replaced result of a place.
Instead = Callable[..., object]
# (number of a call of the model, its output) to whether it is right.
Judge = Callable[[int, np.ndarray], bool]


def explain_chunks(
    session: PairSession, found: Divergence, calls: Calls, capacity: int
) -> Divergence:
    """Return the divergence of a chunked sequence, with its cause if a change makes torch match."""
    flax, port = session.runs("float64")
    wanted = flax.decoder().chunks(calls, capacity)

    def right(number: int, output: np.ndarray) -> bool:
        if number >= len(calls):
            return True
        tokens, counts = calls[number]
        real = np.arange(tokens.shape[1]) < counts[:, None]
        return float64_gap(wanted[number][real], output[real]) is None

    replay = _Decoding(port.module, lambda: port.decoder().chunks(calls, capacity))
    early = right if len(replay.outputs) == len(calls) else None
    divergent = session.modules.get(found.where, found.where)
    return dataclasses.replace(found, cause=_cause(replay, right, divergent, early))


def explain_tokens(
    session: PairSession, found: Divergence, length: int, use_cache: bool
) -> Divergence:
    """Return the divergence of greedy tokens, with its cause if one change makes torch match.

    Args:
        session: of the check.
        found: the divergence.
        length: tokens to write.
        use_cache: whether they are written with a cache.
    """
    if session.pair.prompts is None:
        return found
    tokens, counts = session.pair.prompts
    flax, port = session.runs("float64")
    target = flax.decoder().generate(tokens, counts, length, use_cache)
    replay = _Decoding(
        port.module, lambda: [port.decoder().generate(tokens, counts, length, use_cache)]
    )
    cause = _cause(replay, lambda _, written: np.array_equal(written, target), "", None)
    return dataclasses.replace(found, cause=cause)


def _cause(replay: "_Decoding", right: Judge, divergent: str, early: Judge | None) -> str | None:
    """Describe the first change that makes the decode match; the divergent module's come first."""
    start = time.perf_counter()
    own = [place for place, path in replay.paths.items() if _kind(path) == _kind(divergent)]
    places = own + [place for place in replay.done if place not in own]
    # Common mistakes come first.
    for rule, among in (_mistakes, places), (_arguments, places), (_sums, own):
        for place in among:
            for words, instead in rule(place, replay):
                if time.perf_counter() - start > _SECONDS:
                    return None
                written = replay.run(place, instead, early)
                if written is not None and all(itertools.starmap(right, enumerate(written))):
                    operation = replay.done[place].operation
                    return f"torch matches with {named(words, operation, place.line)}"
    return None


def _mistakes(place: Place, replay: "_Decoding") -> Found:
    """Yield an operation's alternatives, and those that only rows of different lengths show."""
    done, sizes = replay.done[place], replay.sizes
    for number, (words, _) in enumerate(() if _writes(place.name) else alternatives(done, sizes)):

        def other(operation, latest, *args, number=number, **kwargs):
            now = Done(operation, args, kwargs, "", operation(*args, **kwargs))
            instead = alternative(now, sizes, number)
            return instead(*args, **kwargs) if instead is not None else now.result

        yield words, other
    result = done.result
    if isinstance(result, torch.Tensor) and not result.is_floating_point():
        if result.ndim and result.shape[0] > 1 and result.dtype != torch.bool:

            def first(operation, latest, *args, **kwargs):
                rows = operation(*args, **kwargs)
                return rows[:1].expand_as(rows).clone()

            yield "the first row's for all rows", first
    if place.name not in ("__getitem__", "__setitem__"):
        return
    index = done.args[1] if isinstance(done.args[1], tuple) else (done.args[1],)
    integers = (
        axis
        for axis, part in enumerate(index)
        if isinstance(part, torch.Tensor) and part.dtype in (torch.int32, torch.int64)
    )
    for axis, shift in itertools.product(integers, (1, -1)):

        def shifted(operation, latest, x, index, *rest, axis=axis, shift=shift):
            parts = index if isinstance(index, tuple) else (index,)
            return operation(x, (*parts[:axis], parts[axis] + shift, *parts[axis + 1 :]), *rest)

        yield f"index {shift:+d} on axis {axis}", shifted


def _arguments(place: Place, replay: "_Decoding") -> Found:
    """Use the latest result of another place as one of the arguments."""
    for index, argument in enumerate(replay.done[place].args):
        for source, other in replay.fitting(argument, place):

            def instead(operation, latest, *args, index=index, source=source, **kwargs):
                given = latest.get(source)
                given = given if _fits(given, args[index]) else args[index]
                return operation(*args[:index], given, *args[index + 1 :], **kwargs)

            yield f"what {other.name} gave at {source.line} as argument {index + 1}", instead


def _sums(place: Place, replay: "_Decoding") -> Found:
    """Add the latest result of another place, such as a forgotten bias."""
    result = replay.done[place].result
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.ndim < 3:
        return
    for source, other in replay.fitting(result, place):

        def instead(operation, latest, *args, source=source, **kwargs):
            made, given = operation(*args, **kwargs), latest.get(source)
            return made + given if _fits(given, made) else made

        yield f"what {other.name} gave at {source.line} added", instead


class _Decoding:
    """A decode that can be repeated with one place changed."""

    def __init__(self, module: torch.nn.Module, decode: Callable[[], Sequence[np.ndarray]]):
        self._module, self._decode = module, decode
        self.done: dict[Place, Done] = {}  # the operation as it first ran
        self.paths: dict[Place, str] = {}  # the module in which that was
        self.outputs: list[np.ndarray] = []  # of the model's calls

        def look(
            place: Place, path: str, operation: Operation, args: tuple, kwargs: dict
        ) -> object:
            result = operation(*args, **kwargs)
            if place not in self.done:
                done = Done(operation, args, kwargs, place.line, result)
                self.done[place], self.paths[place] = done, path
            return result

        def keep(number: int, output: np.ndarray) -> bool:
            self.outputs.append(output)
            return True

        with self._watched(look, keep):
            decode()
        self.sizes = common_sizes(self.done.values())

    def fitting(self, x: object, at: Place) -> Iterator[tuple[Place, Done]]:
        """Yield other places whose result could stand in for a tensor."""
        for place, done in self.done.items():
            if place != at and done.result is not x and _fits(done.result, x):
                yield place, done

    def run(
        self, changed: Place, instead: Instead, early: Judge | None
    ) -> Sequence[np.ndarray] | None:
        """Return the decode's arrays with one place changed; None if it raises or is wrong."""
        latest: dict[Place, object] = {}

        def run(place: Place, path: str, operation: Operation, args: tuple, kwargs: dict) -> object:
            if place == changed:
                return instead(operation, latest, *args, **kwargs)
            latest[place] = operation(*args, **kwargs)
            return latest[place]

        try:
            with self._watched(run, early), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what is tried, not about the user's code
                return self._decode()
        except (_Diverged, Exception):  # shapes that do not fit, say: then it was not that
            return None

    @contextlib.contextmanager
    def _watched(
        self, run: Callable[[Place, str, Operation, tuple, dict], object], early: Judge | None
    ) -> Iterator[None]:
        """Let `run` run each operation of a block, given its place and module."""
        stack: list[tuple[str, Counter]] = []
        count = itertools.count()

        def change(_: int, operation: Operation) -> Operation | None:
            code, line = place_of_caller()
            if code is None:
                return None
            path, seen = stack[-1] if stack else ("", Counter())
            # A line of a module may run for queries, keys and values in turn; one of a loop around
            # modules runs for each token.
            place = Place(getattr(operation, "__name__", ""), line, code, seen[code])
            seen[code] += 1
            return lambda *args, **kwargs: run(place, path, operation, args, kwargs)

        with contextlib.ExitStack() as hooks:
            for path, module in self._module.named_modules():

                def enter(*_: object, path=path) -> None:
                    stack.append((path, Counter()))

                def leave(module: torch.nn.Module, args: tuple, output: object, path=path) -> None:
                    stack.pop()
                    if not path and early is not None:
                        arrays = [x for x in leaves_of(output) if isinstance(x, torch.Tensor)]
                        if not early(next(count), to_numpy(arrays[0])):
                            raise _Diverged

                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave))
            hooks.enter_context(Watch(change))
            yield


class _Diverged(BaseException):
    """A call has a wrong output, so the rest need not run."""


def _fits(x: object, tensor: object) -> TypeGuard[torch.Tensor]:
    """Whether something is a tensor that can stand in for another, or for all its rows."""
    return (
        isinstance(x, torch.Tensor)
        and isinstance(tensor, torch.Tensor)
        and x.dtype == tensor.dtype
        and x.ndim == tensor.ndim > 0
        and all(n == m or 1 in (n, m) for n, m in zip(x.shape, tensor.shape, strict=True))
    )


def _writes(name: str) -> bool:
    """Whether an operation mutates its arguments and so must not run twice."""
    inside = name.startswith("__i") and name.endswith("__")
    return inside or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _kind(path: str) -> str:
    """Return the path of a module with `*` for numbers of layers."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
