"""Find the cause of a different decode by re-running torch's decoder with one place changed.

A place of its code runs in every layer and at every token, and is changed in all of these alike.
"""

import contextlib
import dataclasses
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, Generic, TypeGuard, TypeVar

import numpy as np
import torch

from parity.check.causes.operations import alternatives, common_sizes
from parity.check.causes.replay import Done, Operation, named, place_of_caller, watched
from parity.check.locate import float64_gap
from parity.check.pair_session import PairSession
from parity.frameworks.capture import leaves_of
from parity.frameworks.protocols import Calls
from parity.frameworks.torch.leaves import to_numpy
from parity.report import Divergence

# Spent at most on the search; the twins of the self-test take up to 16 on an idle machine.
_SECONDS = 60.0

_INDEXING = {"__getitem__", "__setitem__"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operation is called, the same in every layer and call.

    Attributes:
        name: of the operation.
        line: file and line.
        code: the instruction.
        number: how often one call of a module was there before, as for queries and keys.
    """

    name: str
    line: str
    code: tuple[CodeType, int]
    number: int


Decoded = TypeVar("Decoded")
# (operation, latest results by place, *args, **kwargs) to the replaced result of a place.
Instead = Callable[..., Any]
Latest = Mapping[Place, object]


def explain_chunks(
    session: PairSession, found: Divergence, calls: Calls, capacity: int
) -> Divergence:
    """Return the divergence of a chunked sequence, with its cause if one change makes torch match.

    Args:
        session: the pair.
        found: the module where cached and uncached diverge.
        calls: tokens (B, T) and counts (B,) of each.
        capacity: of the cache.
    """
    flax, port = session.runs("float64")
    wanted = flax.decoder().chunks(calls, capacity)
    targets = [_real(call, output) for call, output in zip(calls, wanted, strict=True)]

    def matches(outputs: Sequence[np.ndarray]) -> bool:
        pieces = zip(calls, targets, outputs, strict=True)
        return all(float64_gap(target, _real(call, x)) is None for call, target, x in pieces)

    replay = _Decoding(port.module, lambda: port.decoder().chunks(calls, capacity))
    early = _early(calls, targets) if len(replay.outputs) == len(calls) else None
    divergent = session.modules.get(found.where, found.where)
    return dataclasses.replace(found, cause=_cause(replay, matches, divergent, early))


def explain_tokens(session: PairSession, found: Divergence, use_cache: bool) -> Divergence:
    """Return the divergence of greedy tokens, with its cause if one change makes torch match.

    Args:
        session: the pair.
        found: the decoder whose tokens flip.
        use_cache: of that decoder.
    """
    if session.pair.prompts is None:
        return found
    (tokens, counts), length = session.pair.prompts, session.pair.new_tokens
    flax, port = session.runs("float64")
    target = flax.decoder().generate(tokens, counts, length, use_cache)
    replay = _Decoding(
        port.module, lambda: port.decoder().generate(tokens, counts, length, use_cache)
    )
    cause = _cause(replay, lambda written: np.array_equal(written, target), "")
    return dataclasses.replace(found, cause=cause)


def _cause(
    replay: "_Decoding[Decoded]",
    matches: Callable[[Decoded], bool],
    divergent: str,
    early: Callable[[int, np.ndarray], bool] | None = None,
) -> str | None:
    """Describe the first change that makes the decode match; the divergent module's come first."""
    start = time.perf_counter()
    for words, place, instead in _attempts(replay, divergent):
        if time.perf_counter() - start > _SECONDS:
            return None
        written = replay.run(place, instead, early)
        if written is not None and matches(written):
            return f"torch matches with {named(words, replay.done[place].operation, place.line)}"
    return None


def _attempts(replay: "_Decoding[Any]", divergent: str) -> Iterator[tuple[str, Place, Instead]]:
    """Yield every change of one place with a description; common mistakes come first."""
    own = [place for place, path in replay.paths.items() if _kind(path) == _kind(divergent)]
    places = own + [place for place in replay.done if place not in own]
    sizes = common_sizes(list(replay.done.values()))
    for place in places:
        done = replay.done[place]
        if not _writes(place.name):
            for number, (words, _) in enumerate(alternatives(done, sizes)):
                yield words, place, _alternative(number, sizes)
        for words, instead in _of_rows(done):
            yield words, place, instead
        if place.name in _INDEXING:
            for words, instead in _indices(done):
                yield words, place, instead
    for place in places:
        for words, instead in _arguments(place, replay):
            yield words, place, instead
    for place in own:
        for words, instead in _sums(place, replay):
            yield words, place, instead


def _alternative(number: int, sizes: Sequence[int]) -> Instead:
    """Replace any operation by its alternative of that number."""

    def instead(operation: Operation, latest: Latest, *args: object, **kwargs: object) -> object:
        done = Done(operation, args, kwargs, "", operation(*args, **kwargs))
        found = itertools.islice(alternatives(done, sizes), number, None)
        other = next(found, (None, None))[1]
        return other(*args, **kwargs) if other is not None else done.result

    return instead


def _of_rows(done: Done) -> Iterator[tuple[str, Instead]]:
    """Yield mistakes that only a batch with rows of different lengths shows."""
    result = done.result
    if isinstance(result, torch.Tensor) and not result.is_floating_point():
        if result.ndim and result.shape[0] > 1 and result.dtype != torch.bool:

            def first(operation, latest, *args, **kwargs):
                rows = operation(*args, **kwargs)
                return rows[:1].expand_as(rows).clone()

            yield "the first row's for all rows", first


def _indices(done: Done) -> Iterator[tuple[str, Instead]]:
    """Shift each integer index by one, forwards or back."""
    index = done.args[1] if isinstance(done.args[1], tuple) else (done.args[1],)
    for axis, part in enumerate(index):
        if not isinstance(part, torch.Tensor) or part.dtype not in (torch.int32, torch.int64):
            continue
        for shift in (1, -1):

            def shifted(operation, latest, x, index, *rest, axis=axis, shift=shift):
                parts = index if isinstance(index, tuple) else (index,)
                return operation(x, (*parts[:axis], parts[axis] + shift, *parts[axis + 1 :]), *rest)

            yield f"index {shift:+d} on axis {axis}", shifted


def _arguments(place: Place, replay: "_Decoding[Any]") -> Iterator[tuple[str, Instead]]:
    """Use the latest result of another place as one of the arguments."""
    done = replay.done[place]
    for index, argument in enumerate(done.args):
        if not isinstance(argument, torch.Tensor):
            continue
        for source, other in replay.fitting(argument):
            if source == place:
                continue

            def instead(operation, latest, *args, index=index, source=source, **kwargs):
                given = latest.get(source)
                given = given if _fits(given, args[index]) else args[index]
                return operation(*args[:index], given, *args[index + 1 :], **kwargs)

            yield f"what {other.name} gave at {source.line} as argument {index + 1}", instead


def _sums(place: Place, replay: "_Decoding[Any]") -> Iterator[tuple[str, Instead]]:
    """Add the latest result of another place, such as a forgotten bias."""
    result = replay.done[place].result
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.ndim < 3:
        return
    for source, other in replay.fitting(result):
        if source == place:
            continue

        def instead(operation, latest, *args, source=source, **kwargs):
            made, given = operation(*args, **kwargs), latest.get(source)
            return made + given if _fits(given, made) else made

        yield f"what {other.name} gave at {source.line} added", instead


class _Decoding(Generic[Decoded]):
    """A decode that can be repeated with one place changed.

    Args:
        module: the model.
        decode: decodes with it and returns arrays.

    Attributes:
        done: by place, the operation as it first ran.
        paths: by place, the module in which it first ran.
        outputs: of the model's calls.
    """

    def __init__(self, module: torch.nn.Module, decode: Callable[[], Decoded]):
        self._module, self._decode = module, decode
        self.done: dict[Place, Done] = {}
        self.paths: dict[Place, str] = {}
        self.outputs: list[np.ndarray] = []

        def look(place: Place, path: str, done: Done) -> None:
            if place not in self.done:
                self.done[place], self.paths[place] = done, path

        def keep(number: int, output: np.ndarray) -> bool:
            self.outputs.append(output)
            return True

        with self._watched(None, None, look, keep):
            decode()

    def fitting(self, tensor: torch.Tensor) -> Iterator[tuple[Place, Done]]:
        """Yield places whose result could stand in for a tensor."""
        for place, done in self.done.items():
            if done.result is not tensor and _fits(done.result, tensor):
                yield place, done

    def run(
        self,
        place: Place,
        instead: Instead,
        early: Callable[[int, np.ndarray], bool] | None = None,
    ) -> Decoded | None:
        """Return the decode's arrays with one place changed; None if it raises or is given up.

        Args:
            place: to change.
            instead: its replacement.
            early: (number of a call, its output) to whether it is worth going on.
        """
        try:
            with self._watched(place, instead, None, early), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what is tried, not about the user's code
                return self._decode()
        except (_Diverged, Exception):  # shapes that do not fit, say: then it was not that
            return None

    @contextlib.contextmanager
    def _watched(
        self,
        changed: Place | None,
        instead: Instead | None,
        look: Callable[[Place, str, Done], None] | None,
        early: Callable[[int, np.ndarray], bool] | None,
    ) -> Iterator[None]:
        """Run a block with operations passed to `look` or replaced, and calls passed to `early`."""
        stack: list[tuple[str, Counter]] = []
        latest: dict[Place, object] = {}
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

            def passing(*args: object, **kwargs: object) -> object:
                if place == changed and instead is not None:
                    return instead(operation, latest, *args, **kwargs)
                result = latest[place] = operation(*args, **kwargs)
                if look is not None:
                    look(place, path, Done(operation, args, kwargs, line, result))
                return result

            return passing

        handles = []
        for path, module in self._module.named_modules():

            def enter(*_: object, path=path) -> None:
                stack.append((path, Counter()))

            def leave(module: torch.nn.Module, args: tuple, output: object, path=path) -> None:
                stack.pop()
                if not path and early is not None:
                    arrays = [x for x in leaves_of(output) if isinstance(x, torch.Tensor)]
                    if not early(next(count), to_numpy(arrays[0])):
                        raise _Diverged

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            with watched(change):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Diverged(BaseException):
    """A call has a wrong output, so the rest need not run."""


def _early(calls: Calls, targets: Sequence[np.ndarray]) -> Callable[[int, np.ndarray], bool]:
    """Return whether a call of the model has the right output, as a function of its number."""

    def early(number: int, output: np.ndarray) -> bool:
        if number >= len(calls):
            return True
        return float64_gap(targets[number], _real(calls[number], output)) is None

    return early


def _real(call: tuple[np.ndarray, np.ndarray], output: np.ndarray) -> np.ndarray:
    """Return the outputs of real tokens."""
    tokens, counts = call
    return output[np.arange(tokens.shape[1]) < counts[:, None]]


def _fits(x: object, tensor: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """Whether something is a tensor that can stand in for another, or for all its rows."""
    return (
        isinstance(x, torch.Tensor)
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
