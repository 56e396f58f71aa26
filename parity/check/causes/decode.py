"""Why decoding parts: torch's decoder again, with one place of its code done in another way.

A place runs in every layer and at every token, and is changed in all of these alike.
"""

import contextlib
import dataclasses
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from parity.check.causes.operations import alternatives, common_sizes
from parity.check.causes.replay import Done, Operation, named, place_of_caller, watched
from parity.check.locate import float64_gap
from parity.check.session import Session
from parity.frameworks.capture import leaves_of
from parity.frameworks.torch.leaves import to_numpy
from parity.report import Divergence

# Seconds to look for a cause; the twins of the self-test take up to 16 where nothing else runs.
_PATIENCE = 60.0

_INDEXING = {"__getitem__", "__setitem__"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operation is asked for, the same in every layer and call.

    Attributes:
        name: of the operation.
        line: file and line.
        code: the instruction.
        number: how often one call of a module had been there before, as for queries and keys.
    """

    name: str
    line: str
    code: tuple
    number: int


# What is done at a place, given the arguments and the latest results of others; None for itself.
Instead = Callable[..., Any]
Latest = Mapping[Place, Any]
Calls = Sequence[tuple[np.ndarray, np.ndarray]]


def explained_chunks(
    session: Session, found: Divergence, calls: Calls, capacity: int
) -> Divergence:
    """The divergence of a sequence read in pieces, with its cause if one change makes torch do
    what flax does.

    Args:
        session: the pair.
        found: the module where cached and uncached part.
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
    guilty = session.modules.get(found.where, found.where)
    return dataclasses.replace(found, cause=_cause(replay, matches, guilty, early))


def explained_tokens(
    session: Session, found: Divergence, tokens: np.ndarray, counts: np.ndarray, use_cache: bool
) -> Divergence:
    """The divergence of greedy tokens with its cause, as above.

    Args:
        session: the pair.
        found: the decoder whose tokens flip.
        tokens: prompts (B, T).
        counts: (B,).
        use_cache: of that decoder.
    """
    flax, port = session.runs("float64")
    asked = tokens, counts, session.pair.new_tokens, use_cache
    target = flax.decoder().generate(*asked)
    replay = _Decoding(port.module, lambda: port.decoder().generate(*asked))
    cause = _cause(replay, lambda written: np.array_equal(written, target), "")
    return dataclasses.replace(found, cause=cause)


def _cause(
    replay: "_Decoding",
    matches: Callable[[Any], bool],
    guilty: str,
    early: Callable[[int, np.ndarray], bool] | None = None,
) -> str | None:
    """The first change after which the decode matches, in words; the guilty module's come first."""
    start = time.perf_counter()
    for words, place, instead in _attempts(replay, guilty):
        if time.perf_counter() - start > _PATIENCE:
            return None
        written = replay.run(place, instead, early)
        if written is not None and matches(written):
            return f"torch matches with {named(words, replay.done[place].operation, place.line)}"
    return None


def _attempts(replay: "_Decoding", guilty: str) -> Iterator[tuple[str, Place, Instead]]:
    """Every change of one place, in words; what people mix up before what merely fits."""
    own = [place for place, path in replay.paths.items() if _kind(path) == _kind(guilty)]
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
    """The alternative of that number of whichever operation it is asked to do."""

    def instead(operation: Operation, latest: Latest, *args: Any, **kwargs: Any) -> Any:
        done = Done(operation, args, kwargs, "", operation(*args, **kwargs))
        found = itertools.islice(alternatives(done, sizes), number, None)
        other = next(found, (None, None))[1]
        return other(*args, **kwargs) if other is not None else done.result

    return instead


def _of_rows(done: Done) -> Iterator[tuple[str, Instead]]:
    """What only a batch with rows of many lengths shows."""
    result = done.result
    if isinstance(result, torch.Tensor) and not result.is_floating_point():
        if result.ndim and result.shape[0] > 1 and result.dtype != torch.bool:

            def first(operation, latest, *args, **kwargs):
                rows = operation(*args, **kwargs)
                return rows[:1].expand_as(rows).clone()

            yield "the first row's for all rows", first


def _indices(done: Done) -> Iterator[tuple[str, Instead]]:
    """One place further on, or back."""
    index = done.args[1] if isinstance(done.args[1], tuple) else (done.args[1],)
    for axis, part in enumerate(index):
        if not isinstance(part, torch.Tensor) or part.dtype not in (torch.int32, torch.int64):
            continue
        for shift in (1, -1):

            def shifted(operation, latest, x, index, *rest, axis=axis, shift=shift):
                parts = index if isinstance(index, tuple) else (index,)
                return operation(x, (*parts[:axis], parts[axis] + shift, *parts[axis + 1 :]), *rest)

            yield f"index {shift:+d} on axis {axis}", shifted


def _arguments(place: Place, replay: "_Decoding") -> Iterator[tuple[str, Instead]]:
    """What another place gave last, as one of the arguments."""
    done = replay.done[place]
    for index, argument in enumerate(done.args):
        if not isinstance(argument, torch.Tensor):
            continue
        for source, other in replay.fitting(argument):
            if source == place:
                continue

            def instead(operation, latest, *args, index=index, source=source, **kwargs):
                given = latest.get(source)
                if not isinstance(given, torch.Tensor) or not _fit(given, args[index]):
                    given = args[index]
                return operation(*args[:index], given, *args[index + 1 :], **kwargs)

            yield f"what {other.name} gave at {source.line} as argument {index + 1}", instead


def _sums(place: Place, replay: "_Decoding") -> Iterator[tuple[str, Instead]]:
    """What another place gave last, added: a bias that is forgotten."""
    result = replay.done[place].result
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.ndim < 3:
        return
    for source, other in replay.fitting(result):
        if source == place:
            continue

        def instead(operation, latest, *args, source=source, **kwargs):
            made, given = operation(*args, **kwargs), latest.get(source)
            return made + given if isinstance(given, torch.Tensor) and _fit(given, made) else made

        yield f"what {other.name} gave at {source.line} added", instead


class _Decoding:
    """A decode that can be made again.

    Args:
        module: that is decoded with.
        decode: does it and gives arrays.

    Attributes:
        done: by place, the operation as it was first done.
        paths: by place, the module that it was first done by.
        outputs: of the module's calls.
    """

    def __init__(self, module: torch.nn.Module, decode: Callable[[], Any]):
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
        """Places that gave something which might have stood where a tensor did."""
        for place, done in self.done.items():
            if isinstance(done.result, torch.Tensor) and _fit(done.result, tensor):
                if done.result is not tensor:
                    yield place, done

    def run(
        self,
        place: Place,
        instead: Instead,
        early: Callable[[int, np.ndarray], bool] | None = None,
    ) -> Any:
        """What the decode gives with a place done in another way; None if it cannot be done.

        Args:
            place: the one.
            instead: what to do there.
            early: whether the output of a call, by its number, is worth going on for.
        """
        try:
            with self._watched(place, instead, None, early), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what is tried, not about the user's code
                return self._decode()
        except _Parted:
            return None
        except Exception:  # shapes that do not fit, say: then it was not that
            return None

    @contextlib.contextmanager
    def _watched(
        self,
        changed: Place | None,
        instead: Instead | None,
        look: Callable[[Place, str, Done], None] | None,
        early: Callable[[int, np.ndarray], bool] | None,
    ) -> Iterator[None]:
        """While the decode runs, modules say that they do and operations may be changed."""
        stack: list[tuple[str, Counter]] = []
        latest: dict[Place, Any] = {}
        count = itertools.count()

        def change(_: int, operation: Operation) -> Operation | None:
            code, line = place_of_caller()
            if not line:
                return None
            path, seen = stack[-1] if stack else ("", Counter())
            # A line of a module may run for queries, keys and values in turn; one of a loop around
            # modules runs for each token.
            place = Place(getattr(operation, "__name__", ""), line, code, seen[code])
            seen[code] += 1

            def passing(*args: Any, **kwargs: Any) -> Any:
                if place == changed:
                    return instead(operation, latest, *args, **kwargs)
                result = latest[place] = operation(*args, **kwargs)
                if look is not None:
                    look(place, path, Done(operation, args, kwargs, line, result))
                return result

            return passing

        handles = []
        for path, module in self._module.named_modules():

            def enter(*_: Any, path=path) -> None:
                stack.append((path, Counter()))

            def leave(module: torch.nn.Module, args: tuple, output: Any, path=path) -> None:
                stack.pop()
                if not path and early is not None:
                    arrays = [x for x in leaves_of(output) if isinstance(x, torch.Tensor)]
                    if not early(next(count), to_numpy(arrays[0])):
                        raise _Parted

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            with watched(change):
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Parted(BaseException):
    """A call gave what it should not, so the rest need not be looked at."""


def _early(calls: Calls, targets: Sequence[np.ndarray]) -> Callable[[int, np.ndarray], bool]:
    """Whether a call of the model gave what it should."""

    def early(number: int, output: np.ndarray) -> bool:
        if number >= len(calls):
            return True
        return float64_gap(targets[number], _real(calls[number], output)) is None

    return early


def _real(call: tuple[np.ndarray, np.ndarray], output: np.ndarray) -> np.ndarray:
    """The outputs of tokens that are no padding."""
    tokens, counts = call
    return output[np.arange(tokens.shape[1]) < counts[:, None]]


def _fit(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one can stand where the other does, or for all its rows."""
    sizes = zip(a.shape, b.shape, strict=False)
    return (
        a.dtype == b.dtype
        and a.ndim == b.ndim
        and a.ndim > 0
        and all(n == m or n == 1 or m == 1 for n, m in sizes)
    )


def _writes(name: str) -> bool:
    """Whether an operation changes what it is given, so that it must not be done twice."""
    inside = name.startswith("__i") and name.endswith("__")
    return inside or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _kind(path: str) -> str:
    """The path of a module without the numbers of layers."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
