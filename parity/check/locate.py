"""Where two models diverge: the first module whose output differs although its inputs agree."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from parity.check import bounds
from parity.check.metrics import error_ratio, max_abs, scale_of, size_of
from parity.frameworks.batch import Batch
from parity.frameworks.capture import Backward, Trace, lockstep
from parity.report import Divergence

if TYPE_CHECKING:  # it imports both frameworks, and a golden is checked where one is missing
    from parity.check.pair_session import PairSession

Call = TypeVar("Call", Trace, Backward)
Gap = Callable[[np.ndarray, np.ndarray], float | None]  # None if it is rounding


def locate_forward(session: "PairSession", batch: Batch) -> Divergence | None:
    """Return the first module whose output diverges in float64."""
    with _both(session, batch) as (flax, torch):
        root, paths = session.model_name, session.modules.values()
        return first_divergence(flax, torch, float64_gap, root, "forward", paths)


def locate_backward(session: "PairSession", leaves: Mapping[str, float]) -> Divergence | None:
    """Return the first module, from the loss on, that passes back another gradient in float64.

    A module diverges that gets the same gradient by its output as its counterpart and passes
    another one on, or has another one by one of the leaves, whose gaps are given by flax's names.
    Where the gradient that reaches a module already differs and all modules after it agree, its
    caller diverges.

    Returns:
        None when all that pass gradients on agree.
    """
    flax, torch = (run.backward(session.gradient_probe) for run in session.runs("float64"))
    passed = (x for call in torch for x in (*call.inputs, call.output) if x is not None)
    # Below this size a gradient is rounding of larger ones.
    floor = bounds.ZERO_GRADIENT * max(map(size_of, passed), default=0.0)

    def gap(a: np.ndarray, b: np.ndarray) -> float | None:
        size = max(size_of(a), size_of(b), floor)
        found = max_abs(a, aligned(b, a)) / size if size else 0.0
        return None if found <= bounds.MODULE_GRADIENT else found

    twins = matched(torch, translated(flax, session.modules))
    pairs = [(call, twin) for call, twin in twins if twin is not None]
    # The gap between the gradients that reach each call, and by path that of its last call.
    gaps = [
        None if call.output is None or twin.output is None else gap(call.output, twin.output)
        for call, twin in pairs
    ]
    reached = {call.path: x for (call, _), x in reversed(list(zip(pairs, gaps, strict=True)))}
    owners = {session.modules.get(x.rpartition(".")[0]): x for x in reversed(list(leaves))}
    root = session.model_name
    for (call, twin), reaching in zip(pairs, gaps, strict=True):
        if reaching is not None:
            # A module may return what its caller returns, unchanged.
            where = _caller(call.path, reached)
            while where and reached.get(where) is not None:
                where = _caller(where, reached)
            where = "loss" if reached.get(where) is not None else where or root
            detail = f"The gradient that reaches {call.path or 'the model'} diverges in its code."
            return Divergence(where, "backward", 0, reaching, detail=detail)
        if (found := _inputs_gap(call, twin, gap)) is not None:
            detail = "Given the same gradient of its output it passes another one on."
        elif leaf := owners.get(call.path):
            found = leaves[leaf]
            detail = f"Its leaf {leaf.rpartition('.')[2]} has another gradient."
        else:
            continue
        detail += " All between it and the loss agrees."
        return Divergence(call.path or root, "backward", 0, found, detail=detail)
    return None


def _inputs_gap(a: Backward, b: Backward, gap: Gap) -> float | None:
    """Return the largest gap between the gradients that two calls pass back by their arguments."""
    sides = [list(call.inputs) for call in (a, b)]
    if len(sides[0]) != len(sides[1]):
        # Torch's attention is given its input three times and flax's once: sums are compared.
        if not all(side and len({x.shape for x in side}) == 1 for side in sides):
            return None
        sides = [[np.sum(side, axis=0)] for side in sides]
    gaps = [gap(x, y) for x, y in zip(*sides, strict=True)]
    return max((x for x in gaps if x is not None), default=None)


def locate_rounding(session: "PairSession", batch: Batch) -> Divergence | None:
    """Return the first module that loses more in float32 than its twin does, against float64.

    Gaps are ratios of errors here, because two correct float32 runs differ everywhere.
    """
    _, truth = session.runs("float64")
    flax, torch = session.runs("float32")
    captures = [functools.partial(run.traces, batch) for run in (flax, torch, truth)]
    with lockstep(*captures) as (ours, theirs, exact):
        for trace, twin, right in matched(translated(ours, session.modules), theirs, exact):
            if twin is None or right is None:
                continue
            ratio = _ratio(trace.output, twin.output, right.output)
            if ratio <= bounds.RATIO:
                continue
            where, inputs = trace.path, zip(trace.inputs, twin.inputs, right.inputs, strict=False)
            if where and any(len(_floats(x)) == 3 and _ratio(*x) > bounds.RATIO for x in inputs):
                where = _caller(where, session.modules.values())
            agrees = "" if session.impurities else "; float64 agrees"
            detail = f"Value is the larger float32 error over the smaller{agrees}."
            return Divergence(where or session.model_name, "forward", 0, ratio, detail=detail)
    return None


def _ratio(flax: np.ndarray, torch: np.ndarray, truth: np.ndarray) -> float:
    return error_ratio(aligned(flax, torch), torch, truth)


def _floats(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    return [x for x in arrays if np.issubdtype(x.dtype, np.floating)]


def _caller(path: str, paths: Collection[str]) -> str:
    """Return the path of the called module around another; "" for the model itself."""
    parent = path.rpartition(".")[0]
    while parent and parent not in paths:
        parent = parent.rpartition(".")[0]
    return parent


def gaps_by_module(session: "PairSession", batch: Batch) -> list[tuple[str, float]]:
    """Return path and largest difference of the outputs of each module, in order of completion."""
    with _both(session, batch) as sides:
        pairs = ((a, b.output) for a, b in matched(*sides) if b is not None)
        root = session.model_name
        return [(a.path or root, max_abs(a.output, aligned(b, a.output))) for a, b in pairs]


def first_divergence(
    a: Iterable[Trace], b: Iterable[Trace], gap: Gap, root: str, phase: str, paths: Collection[str]
) -> Divergence | None:
    """Return the first module to complete whose output differs although its inputs agree.

    Both have the same paths; `root` is the name of the model itself.

    Returns:
        The caller of a module whose inputs differ while all that completed before it agrees: it was
        fed by wrong code outside of modules, in its caller's body. None when nothing differs.
    """
    for trace, twin in matched(a, b):
        if twin is None or (found := gap(trace.output, twin.output)) is None:
            continue
        if trace.path and _inputs_differ(trace.inputs, twin.inputs, gap):
            detail = f"Its own code diverges before {trace.path} is called; all before that agrees."
            return Divergence(_caller(trace.path, paths) or root, phase, 0, found, detail=detail)
        detail = "Given the same input its output differs; all before it agrees."
        return Divergence(trace.path or root, phase, 0, found, detail=detail)
    return None


def matched(
    a: Iterable[Call], *others: Iterable[Call]
) -> Iterator[tuple[Call, *tuple[Call | None, ...]]]:
    """Yield each trace of `a` with those of the same call of the same module; None where missing.

    The others are read no further than necessary; traces that come early are kept.
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
    """Yield Flax traces under torch's paths, without those of modules that torch does not have."""
    for trace in traces:
        if trace.path in modules:
            yield dataclasses.replace(trace, path=modules[trace.path])


def float64_gap(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the largest difference between two float64 outputs; None if it is rounding."""
    gap = max_abs(a, aligned(b, a))
    return None if gap <= bounds.MODULE_OUTPUT * scale_of(a) else gap


def aligned(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return an activation with its axes in the order of another framework's, by the best fit.

    Torch has channels after the batch and flax has them last; some have time before the batch;
    heads may share an axis with their width.
    """
    tried = [array]
    if array.ndim >= 3:
        tried += np.moveaxis(array, 1, -1), np.moveaxis(array, -1, 1), np.swapaxes(array, 0, 1)
    if array.size == like.size:
        tried.append(array.reshape(like.shape))
    fitting = [x for x in tried if x.shape == like.shape]
    if len(fitting) < 2:
        return (fitting or [array])[0]
    return min(fitting, key=lambda x: np.nan_to_num(max_abs(x, like), nan=np.inf))


@contextlib.contextmanager
def _both(
    session: "PairSession", batch: Batch
) -> Iterator[tuple[Iterator[Trace], Iterator[Trace]]]:
    """Capture a float64 forward pass of both models, flax's under torch's paths."""
    captures = [functools.partial(run.traces, batch) for run in session.runs("float64")]
    with lockstep(*captures) as (flax, torch):
        yield translated(flax, session.modules), torch


def _inputs_differ(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...], gap: Gap) -> bool:
    """Whether the inputs of two modules differ."""
    if len(a) == len(b):
        return any(gap(x, y) is not None for x, y in zip(a, b, strict=True))
    # Each float of the fewer must be among the others: torch's attention is given its input three
    # times and flax's once.
    few, many = sorted((_floats(a), _floats(b)), key=len)
    return any(all(gap(x, y) is not None for y in many) for x in few)


def _numbered(traces: Iterable[Call]) -> Iterator[tuple[tuple[str, int], Call]]:
    """Yield each trace with its path and how many calls of the same module came before it."""
    seen: dict[str, int] = {}
    for trace in traces:
        seen[trace.path] = seen.get(trace.path, -1) + 1
        yield (trace.path, seen[trace.path]), trace
