"""Where two models part: the first module, by what went in and what came out."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.capture import Trace
from parity.compare import error_ratio, max_abs
from parity.pair import Batch
from parity.report import Divergence
from parity.subject import Subject

# Of the largest number in an array; the noise is near 1e-15 and the smallest bug near 1e-5.
_FLOAT64 = 1e-12
# As for logits: the larger float32 error over the smaller.
_RATIO = 4.0

Gap = Callable[[np.ndarray, np.ndarray], float | None]


def locate_forward(subject: Subject, batch: Batch) -> Divergence | None:
    """The first module whose output parts in float64."""
    flax, torch = (run.traces(batch) for run in subject.runs("float64"))
    return first_divergence(flax, torch, float64_gap, model_name(subject), "forward")


def locate_rounding(subject: Subject, batch: Batch) -> Divergence | None:
    """The first module that loses more in float32 than its twin does, against float64.

    Gaps are ratios of errors here, since two healthy float32 runs differ everywhere.
    """
    truth, _ = (run.traces(batch) for run in subject.runs("float64"))
    flax, torch = (run.traces(batch) for run in subject.runs("float32"))
    torch = {(trace.path, nth): trace for trace, nth in _numbered(torch)}
    exact = {(trace.path, nth): trace for trace, nth in _numbered(truth)}
    for trace, nth in _numbered(flax):
        key = trace.path, nth
        if key not in torch or key not in exact:
            continue
        ratio = error_ratio(trace.output, torch[key].output, exact[key].output)
        if not ratio <= _RATIO:
            where = trace.path or model_name(subject)
            detail = "Value is the larger float32 error over the smaller; float64 agrees."
            return Divergence(where, "forward", 0, ratio, detail=detail)
    return None


def gaps_by_module(subject: Subject, batch: Batch) -> list[tuple[str, float]]:
    """The path of each module and the largest difference of its outputs, in order of completion."""
    flax, torch = (run.traces(batch) for run in subject.runs("float64"))
    twins = {(trace.path, nth): trace.output for trace, nth in _numbered(torch)}
    return [
        (trace.path or model_name(subject), max_abs(trace.output, twins[trace.path, nth]))
        for trace, nth in _numbered(flax)
        if (trace.path, nth) in twins
    ]


def first_divergence(
    a: list[Trace], b: list[Trace], gap: Gap, root: str, phase: str, step: int = 0
) -> Divergence | None:
    """The first module, by order of completion, that is guilty and not a victim.

    A module whose output parts although its input does not is guilty. One whose input has parted,
    while everything that finished before it agrees, was fed by wrong code outside of modules, in
    the body of its parent.
    """
    twins = {(trace.path, nth): trace for trace, nth in _numbered(b)}
    paths = {trace.path for trace in a}
    for trace, nth in _numbered(a):
        twin = twins.get((trace.path, nth))
        if twin is None or (found := gap(trace.output, twin.output)) is None:
            continue
        inputs = itertools.zip_longest(trace.inputs, twin.inputs)
        if trace.path and any(x is None or y is None or gap(x, y) is not None for x, y in inputs):
            parent = trace.path.rpartition(".")[0]
            while parent and parent not in paths:
                parent = parent.rpartition(".")[0]
            detail = f"Its own code parts before {trace.path} is called; all before that agrees."
            return Divergence(parent or root, phase, step, found, detail=detail)
        detail = "Given the same input its output differs; all before it agrees."
        return Divergence(trace.path or root, phase, step, found, detail=detail)
    return None


def float64_gap(a: np.ndarray, b: np.ndarray) -> float | None:
    """The largest difference where it is more than rounding, else None."""
    gap = max_abs(a, b)
    sizes = np.abs(a[np.isfinite(a)])
    scale = max(1.0, float(np.max(sizes, initial=0.0)))
    return None if gap <= _FLOAT64 * scale else gap


def model_name(subject: Subject) -> str:
    """What to call the model itself, whose path is empty."""
    return type(subject.runs("float64")[1].module).__name__


def _numbered(traces: list[Trace]) -> list[tuple[Trace, int]]:
    """Each trace with how many calls of the same module came before it."""
    seen: dict[str, Any] = {}
    numbered = []
    for trace in traces:
        seen[trace.path] = seen.get(trace.path, -1) + 1
        numbered.append((trace, seen[trace.path]))
    return numbered
