"""Where two models part: the first module, by what went in and what came out."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from parity.check.metrics import error_ratio, max_abs
from parity.check.session import Session
from parity.frameworks.capture import Backward, Trace, lockstep
from parity.frameworks.spec import Batch
from parity.report import Divergence

# Of the largest number in an array; the noise is near 1e-15 and the smallest bug near 1e-5.
_FLOAT64 = 1e-12
# Of the largest number in a gradient; rounding through all layers is near 1e-14.
_GRADIENT = 1e-9
# As for logits: the larger float32 error over the smaller.
_RATIO = 4.0

Call = TypeVar("Call", Trace, Backward)
Gap = Callable[[np.ndarray, np.ndarray], float | None]


def locate_forward(session: Session, batch: Batch) -> Divergence | None:
    """The first module whose output parts in float64."""
    with _both(session, batch) as (flax, torch):
        return first_divergence(
            flax, torch, float64_gap, model_name(session), "forward", session.modules.values()
        )


def locate_backward(session: Session, leaves: Mapping[str, float]) -> Divergence | None:
    """The first module, from the loss on, that passes back another gradient in float64.

    A module that gets the same gradient by its output as its counterpart and passes another one on,
    or has another one by a leaf of its own, is guilty. Where the gradient that reaches a module has
    parted and all behind it agrees, its caller is.

    Args:
        session: the pair.
        leaves: flax's names of those whose gradients part, and how far.
    """
    probe = session.gradient_probe
    flax, torch = (run.backward(probe) for run in session.runs("float64"))
    flax = translated(flax, session.modules)
    largest = max((_size(x) for call in torch for x in _passed(call)), default=0.0)
    gap = functools.partial(_gradient_gap, floor=_FLOAT64 * largest)
    pairs = [(call, twin) for call, twin in matched(torch, flax) if twin is not None]
    # How far apart the gradients are that reach each call, and by path those of the last.
    gaps = [
        None if call.output is None or twin.output is None else gap(call.output, twin.output)
        for call, twin in pairs
    ]
    reached = {call.path: x for (call, _), x in reversed(list(zip(pairs, gaps, strict=True)))}
    owners = {session.modules.get(x.rpartition(".")[0]): x for x in reversed(leaves)}
    for (call, twin), parted in zip(pairs, gaps, strict=True):
        if parted is not None:
            # What a module gives may be what its caller gives, as it is.
            where = _caller(call.path, reached)
            while where and reached.get(where) is not None:
                where = _caller(where, reached)
            where = "loss" if reached.get(where) is not None else where or model_name(session)
            detail = f"The gradient that reaches {call.path or 'the model'} parts in its code."
            return Divergence(where, "backward", 0, parted, detail=detail)
        if (found := _inputs_gap(call, twin, gap)) is not None:
            detail = "Given the same gradient of its output it passes another one on."
        elif leaf := owners.get(call.path):
            found = leaves[leaf]
            detail = f"Its leaf {leaf.rpartition('.')[2]} has another gradient."
        else:
            continue
        detail += " All between it and the loss agrees."
        return Divergence(call.path or model_name(session), "backward", 0, found, detail=detail)
    return None


def _inputs_gap(a: Backward, b: Backward, gap: Gap) -> float | None:
    """How far apart what two calls pass back by their arguments is.

    Where they take another number of arguments it is the sum that is compared: torch's attention is
    given its input three times and flax's once.
    """
    sides = [list(call.inputs) for call in (a, b)]
    if len(sides[0]) != len(sides[1]):
        if not all(side and len({x.shape for x in side}) == 1 for side in sides):
            return None
        sides = [[np.sum(side, axis=0)] for side in sides]
    gaps = [gap(x, y) for x, y in zip(*sides, strict=True)]
    return max((x for x in gaps if x is not None), default=None)


def _passed(call: Backward) -> tuple[np.ndarray, ...]:
    return call.inputs if call.output is None else (*call.inputs, call.output)


def _gradient_gap(a: np.ndarray, b: np.ndarray, floor: float) -> float | None:
    """The largest difference where it is more than rounding, in the largest number; else None.

    Args:
        a: a gradient.
        b: the other's.
        floor: size below which a gradient is rounding of larger ones.
    """
    size = max(_size(a), _size(b), floor)
    gap = max_abs(a, aligned(b, a)) / size if size else 0.0
    return None if gap <= _GRADIENT else gap


def _size(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def locate_rounding(session: Session, batch: Batch) -> Divergence | None:
    """The first module that loses more in float32 than its twin does, against float64.

    Gaps are ratios of errors here, since two healthy float32 runs differ everywhere.
    """
    _, truth = session.runs("float64")
    flax, torch = session.runs("float32")
    captures = [
        lambda on_trace, run=run: run.traces(batch, on_trace) for run in (flax, torch, truth)
    ]
    with lockstep(*captures) as (ours, theirs, exact):
        for trace, *others in matched(translated(ours, session.modules), theirs, exact):
            if None in others:
                continue
            twin, right = others
            ratio = _ratio(trace.output, twin.output, right.output)
            if ratio <= _RATIO:
                continue
            where = trace.path
            inputs = zip(trace.inputs, twin.inputs, right.inputs, strict=False)
            if where and any(_ratio(*three) > _RATIO for three in inputs if _are_floats(three)):
                where = _caller(where, session.modules.values())
            agrees = "" if session.impurities else "; float64 agrees"
            detail = f"Value is the larger float32 error over the smaller{agrees}."
            return Divergence(where or model_name(session), "forward", 0, ratio, detail=detail)
    return None


def _ratio(flax: np.ndarray, torch: np.ndarray, truth: np.ndarray) -> float:
    return error_ratio(aligned(flax, torch), torch, truth)


def _are_floats(arrays: Iterable[np.ndarray]) -> bool:
    return all(np.issubdtype(array.dtype, np.floating) for array in arrays)


def _caller(path: str, paths: Collection[str]) -> str:
    """The module around another that is called."""
    parent = path.rpartition(".")[0]
    while parent and parent not in paths:
        parent = parent.rpartition(".")[0]
    return parent


def gaps_by_module(session: Session, batch: Batch) -> list[tuple[str, float]]:
    """The path of each module and the largest difference of its outputs, in order of completion."""
    with _both(session, batch) as sides:
        return [
            (
                trace.path or model_name(session),
                max_abs(trace.output, aligned(twin.output, trace.output)),
            )
            for trace, twin in matched(*sides)
            if twin is not None
        ]


def first_divergence(
    a: Iterable[Trace],
    b: Iterable[Trace],
    gap: Gap,
    root: str,
    phase: str,
    paths: Collection[str],
) -> Divergence | None:
    """The first module, by order of completion, that is guilty and not a victim.

    A module whose output parts although its input does not is guilty. One whose input has parted,
    while everything that finished before it agrees, was fed by wrong code outside of modules, in
    the body of its parent.

    Args:
        a: one model's traces.
        b: the other's, under the same paths.
        gap: how far two arrays are apart; None if they are not.
        root: what to call the model itself.
        phase: of the divergence.
        paths: of the modules that are called.
    """
    for trace, twin in matched(a, b):
        if twin is None or (found := gap(trace.output, twin.output)) is None:
            continue
        if trace.path and _inputs_part(trace.inputs, twin.inputs, gap):
            parent = _caller(trace.path, paths)
            detail = f"Its own code parts before {trace.path} is called; all before that agrees."
            return Divergence(parent or root, phase, 0, found, detail=detail)
        detail = "Given the same input its output differs; all before it agrees."
        return Divergence(trace.path or root, phase, 0, found, detail=detail)
    return None


def matched(
    a: Iterable[Call], *others: Iterable[Call]
) -> Iterator[tuple[Call, *tuple[Call | None, ...]]]:
    """Each trace of `a` with those of the same call of the same module, None where there is none.

    The others are read no further than they must be, and what comes early is kept until its turn.
    """
    streams = [_numbered(other) for other in others]
    early: list[dict[tuple[str, int], Call]] = [{} for _ in others]
    for key, trace in _numbered(a):
        twins = []
        for stream, waiting in zip(streams, early, strict=True):
            while key not in waiting and (following := next(stream, None)) is not None:
                waiting[following[0]] = following[1]
            twins.append(waiting.pop(key, None))
        yield trace, *twins


def translated(traces: Iterable[Call], modules: Mapping[str, str]) -> Iterator[Call]:
    """Flax traces under torch's paths, without those of modules that torch does not have."""
    for trace in traces:
        if trace.path in modules:
            yield dataclasses.replace(trace, path=modules[trace.path])


def float64_gap(a: np.ndarray, b: np.ndarray) -> float | None:
    """The largest difference where it is more than rounding, else None."""
    gap = max_abs(a, aligned(b, a))
    sizes = np.abs(a[np.isfinite(a)])
    scale = max(1.0, float(np.max(sizes, initial=0.0)))
    return None if gap <= _FLOAT64 * scale else gap


def aligned(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """An activation in the order of axes of another framework's, whichever fits it best.

    Torch has channels behind the batch and flax has them last; some have time before the batch;
    heads may share an axis with what they are wide.
    """
    arrangements = [array]
    if array.ndim >= 3:
        arrangements += [
            np.moveaxis(array, 1, -1),
            np.moveaxis(array, -1, 1),
            np.swapaxes(array, 0, 1),
        ]
    if array.size == like.size:
        arrangements.append(array.reshape(like.shape))
    fitting = [x for x in arrangements if x.shape == like.shape]
    if len(fitting) < 2:
        return (fitting or [array])[0]
    gaps = [max_abs(x, like) for x in fitting]
    return fitting[int(np.nanargmin(gaps))] if not np.all(np.isnan(gaps)) else fitting[0]


def model_name(session: Session) -> str:
    """What to call the model itself, whose path is empty."""
    return type(session.runs("float64")[1].module).__name__


@contextlib.contextmanager
def _both(session: Session, batch: Batch) -> Iterator[tuple[Iterator[Trace], Iterator[Trace]]]:
    """The traces of a forward pass in float64 of both sides, flax's under torch's paths."""
    captures = [
        lambda on_trace, run=run: run.traces(batch, on_trace) for run in session.runs("float64")
    ]
    with lockstep(*captures) as (flax, torch):
        yield translated(flax, session.modules), torch


def _inputs_part(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...], gap: Gap) -> bool:
    """Whether what two modules were given differs.

    Where they take another number of arguments, each float of the fewer must be among the others:
    torch's attention is given its input three times and flax's once.
    """
    if len(a) == len(b):
        return any(gap(x, y) is not None for x, y in zip(a, b, strict=True))
    floats = [[x for x in side if np.issubdtype(x.dtype, np.floating)] for side in (a, b)]
    few, many = sorted(floats, key=len)
    return any(all(gap(x, y) is not None for y in many) for x in few)


def _numbered(traces: Iterable[Call]) -> Iterator[tuple[tuple[str, int], Call]]:
    """Each trace behind its path and how many calls of the same module came before it."""
    seen: dict[str, int] = {}
    for trace in traces:
        seen[trace.path] = seen.get(trace.path, -1) + 1
        yield (trace.path, seen[trace.path]), trace
