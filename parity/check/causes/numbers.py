"""Numbers of a torch module's own code, replaced by others: those that it holds, and fitted ones.

A number is fitted by Newton's steps on the whole output, so that a wrong operation is given up
after two runs: no number in it brings the output closer by orders.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from parity.check.causes.operations import Found, common_sizes, on_argument
from parity.check.causes.replay import Changed, Done, Operation, Replay, named
from parity.check.locate import aligned
from parity.check.metrics import size_of

# A first step must leave less than this of the gap, and the last one less than that, in at most as
# many steps; a change of fewer numbers than these could be fitted by anything.
_PROMISING, _LEFT, _STEPS, _NUMBERS = 0.98, 1e-5, 12, 4
# The share by which a number is moved to see what depends on it.
_MOVE = 1e-5

Arrays = np.ndarray
WithNumber = Callable[[float], Operation]


def held_numbers(done: Done, modules: Iterable[torch.nn.Module]) -> Found:
    """Yield an operation with its number replaced by each other float that the modules hold."""
    held = {
        value
        for part in modules
        for name, value in vars(part).items()
        if isinstance(value, float) and not name.startswith("_")
    }
    for now, words, given in _numbers(done):
        for value in sorted(held - {now}):
            yield f"{words} {value:g}, not {now:g}", given(value)


def fitted(replay: Replay, target: Arrays, deadline: float) -> Iterator[Changed]:
    """Yield changes of one number, or of the size of one result, that bring the output closer.

    Args:
        replay: of the call.
        target: the output that it should have.
        deadline: after which to stop, by `time.perf_counter`.
    """
    operations = replay.operations()
    sizes = common_sizes(operations)

    def gap(changed: Changed | None) -> Arrays | None:
        output = replay.output(changed)
        if output is None:
            return None
        output = aligned(output, target)
        return (output - target).ravel() if output.shape == target.shape else None

    start = gap(None)
    if start is None or not np.all(np.isfinite(start)) or np.count_nonzero(start) < _NUMBERS:
        return
    # One line of code that runs several times, as in every layer, and each operation alone.
    lines: dict[tuple[str, str], list[int]] = {}
    for place, done in enumerate(operations):
        lines.setdefault((done.name, done.line), []).append(place)
    groups = [places for (_, line), places in lines.items() if line and len(places) > 1]
    for places in (*groups, *([place] for place in range(len(operations)))):
        done = operations[places[0]]
        kinds = [list(_kinds(operations[place])) for place in places]
        if len({len(kind) for kind in kinds}) > 1:
            continue
        for number, (now, words, _) in enumerate(kinds[0]):
            given = {place: kind[number][2] for place, kind in zip(places, kinds, strict=True)}

            def made(value: float, done=done, words=words, given=given) -> Changed:
                def change(at: int, _: object) -> Operation | None:
                    return given[at](value) if at in given else None

                text = named(f"{words} {_written(value, sizes)}", done.operation, done.line)
                return Changed(text, change, inside=done.inside)

            if time.perf_counter() > deadline:
                return
            if (value := _solved(lambda x, made=made: gap(made(x)), now, start)) is not None:
                yield made(value)


def _kinds(done: Done) -> Iterator[tuple[float, str, WithNumber]]:
    """Yield each number of an operation's arguments, and those that change its result."""
    yield from _numbers(done)
    yield from _results(done)


def _solved(gap: Callable[[float], Arrays | None], now: float, start: Arrays) -> float | None:
    """Return the number that closes a gap; None where none does."""
    value, left, size = now, start, float(np.linalg.norm(start))
    for step in range(_STEPS):
        move = _MOVE * max(abs(value), 1e-3)
        if (moved := gap(value + move)) is None:
            return None
        slope = (moved - left) / move
        square = float(slope @ slope)
        if not square or not math.isfinite(square):
            return None
        change = -float(slope @ left) / square
        rest = float(np.linalg.norm(left + change * slope))
        before = float(np.linalg.norm(left))
        if step == 0 and rest > _PROMISING * before:
            return None
        # A step that goes too far is halved.
        for _ in range(4):
            found = gap(value + change)
            if found is not None and float(np.linalg.norm(found)) < before:
                break
            change /= 2
        else:
            return value if before <= _LEFT * size else None
        value, left = value + change, found
        if abs(change) <= 1e-14 * abs(value) or size_of(left) <= 1e-15 * size_of(start):
            break
    return value if float(np.linalg.norm(left)) <= _LEFT * size else None


def _numbers(done: Done) -> Iterator[tuple[float, str, WithNumber]]:
    """Yield each float argument of an operation, its description, and how to give another."""
    if not _is_float(done.result):
        return
    for place, value in enumerate(done.args):
        if isinstance(value, float) and math.isfinite(value):
            given = lambda x, place=place: on_argument(place, done.operation, lambda _: x)  # noqa: E731
            yield value, "the number", given
    for name, value in done.kwargs.items():
        if isinstance(value, float) and math.isfinite(value):

            def named_number(x: float, name: str = name) -> Operation:
                return lambda *args, **kwargs: done.operation(*args, **kwargs | {name: x})

            yield value, f"{name} =", named_number


def _results(done: Done) -> Iterator[tuple[float, str, WithNumber]]:
    """Yield the scale of a result, and what is added to it."""
    if _is_float(done.result):
        operation = done.operation
        yield 1.0, "a scale of", lambda x: lambda *args, **kwargs: operation(*args, **kwargs) * x
        yield 0.0, "plus", lambda x: lambda *args, **kwargs: operation(*args, **kwargs) + x


def _is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel() > 1


def _written(value: float, sizes: list[int]) -> str:
    """Write a number, as a power of a size if it is one."""
    for size in (*sizes, *range(2, 257)):
        for power in (0.5, -0.5, -1.0):
            if math.isclose(value, size**power, rel_tol=1e-9) and not value.is_integer():
                return f"{value:.6g} = {size}**{power:g}"
    return f"{value:.9g}"
