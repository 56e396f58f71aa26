"""Where two models diverge: the first module whose output differs although its inputs agree."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from parity.check import bounds
from parity.check.metrics import error_ratio, max_abs, scale_of, size_of
from parity.frameworks.batch import Batch
from parity.frameworks.capture import Backward, Trace, lockstep, map_leaves
from parity.frameworks.protocols import LiveRunner
from parity.report import Divergence

if TYPE_CHECKING:  # it imports both frameworks, and a golden is checked where one is missing
    from parity.check.pair_session import PairSession

Call = TypeVar("Call", Trace, Backward)
Gap = Callable[[np.ndarray, np.ndarray], float | None]  # None if it is rounding
Key = tuple[str, int]  # path of a module, and how many of its calls came before
# How far rounding of constants moves the inputs and the output of calls.
Noise = Mapping[Key, tuple[float, float]]
_NONE: Noise = {}
# A call to the calls whose inputs depend on what differs in its output.
Readers = Callable[[Key], Collection[Key]]


def locate_forward(session: "PairSession", batch: Batch) -> Divergence | None:
    """Return the first module whose output diverges in float64."""
    noise, root = noise_of_constants(session, batch), session.model_name
    with _both(session, batch) as sides:
        readers = functools.partial(_readers, session, batch, noise)
        return first_divergence(*sides, float64_gap, root, "forward", readers, noise)


def noise_of_constants(session: "PairSession", batch: Batch) -> Noise:
    """Return how far rounding of constants that a model holds in a narrow type may move calls.

    It is empty where neither model holds any.
    """
    found: dict[Key, tuple[float, float]] = {}
    for number, runs in enumerate(session.moved_runs if session.held_constants else ()):
        sides: list[list[Trace]] = [[], []]
        for run, side in zip(runs, sides, strict=True):
            cast("LiveRunner", run).traces(batch, side.append)
        known = sides if number else [translated(side, session.modules) for side in sides]
        for (key, trace), (_, moved) in zip(*map(_numbered, known), strict=True):
            inputs = zip(trace.inputs, moved.inputs, strict=True)
            fed, given = found.get(key, (0.0, 0.0))
            fed += bounds.HELD_CONSTANTS * max((_moved(*x) for x in inputs), default=0.0)
            given += bounds.HELD_CONSTANTS * _moved(trace.output, moved.output)
            found[key] = fed, given
    return found


def _moved(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference between finite numbers."""
    finite = np.isfinite(a) & np.isfinite(b)
    return max_abs(a[finite], b[finite])


def beyond(gap: Gap, noise: float) -> Gap:
    """Return a gap that is None up to some noise."""

    def found(a: np.ndarray, b: np.ndarray) -> float | None:
        value = gap(a, b)
        return None if value is None or value <= noise else value

    return found if noise else gap


def _readers(session: "PairSession", batch: Batch, held: Noise, key: Key) -> set[Key]:
    """Return torch's calls whose inputs change with what differs in the output of one call."""
    path, number = key
    with _both(session, batch) as sides:
        calls = ((a, b) for a, b in matched(*sides) if a.path == path and b is not None)
        found = next(itertools.islice(calls, number, None), None)
    if found is None or not np.issubdtype(found[1].output.dtype, np.floating):
        return set()
    ours, theirs = found[0].output, found[1].output
    noise = np.random.default_rng(0).normal(size=theirs.shape) * size_of(theirs)
    if (like := aligned(ours, theirs)).shape == theirs.shape:
        bound = max(bounds.MODULE_OUTPUT * scale_of(theirs), held.get(key, (0.0, 0.0))[1])
        noise *= ~(np.abs(like - theirs) <= bound)
    return changed_inputs(session, batch, key, noise)


def changed_inputs(
    session: "PairSession", batch: Batch, key: Key, noise: np.ndarray | None = None
) -> set[Key]:
    """Return torch's calls whose inputs change when noise is added to the output of one call."""
    run, (path, number) = session.runs("float64")[1], key
    count = itertools.count()

    def disturb(_: object, __: object, output: object) -> object:
        if next(count) != number:
            return None
        first = itertools.count()

        def changed(x: Any) -> Any:
            if not (hasattr(x, "is_floating_point") and x.is_floating_point()) or next(first):
                return x
            drawn = np.random.default_rng(0).normal(size=x.shape) if noise is None else noise
            return x + x.new_tensor(drawn)

        return map_leaves(output, changed)

    def inputs() -> dict[Key, list[bytes]]:
        seen: list[Trace] = []
        run.traces(batch, lambda trace: seen.append(_digested(trace)))
        return {key: [x.tobytes() for x in trace.inputs] for key, trace in _numbered(seen)}

    before = inputs()
    with run.module.get_submodule(path).register_forward_hook(disturb):
        after = inputs()
    return {key for key in before if before[key] != after.get(key)}


def _digested(trace: Trace) -> Trace:
    """Return a trace with a digest in place of every input, and without its output."""
    digests = (hashlib.blake2b(x.tobytes()).digest() for x in trace.inputs)
    inputs = tuple(np.frombuffer(x, np.uint8) for x in digests)
    return Trace(trace.path, inputs, np.empty(0))


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
            if call.path and _is_fed_otherwise(session, call.path):
                where = _caller(call.path, reached) or root
                detail = f"Its code passes another input to {call.path}, whose output hides that."
                return Divergence(where, "backward", 0, found, detail=detail)
            detail = "Given the same gradient of its output it passes another one on."
        elif leaf := owners.get(call.path):
            found = leaves[leaf]
            detail = f"Its leaf {leaf.rpartition('.')[2]} has another gradient."
        else:
            continue
        detail += " All between it and the loss agrees."
        return Divergence(call.path or root, "backward", 0, found, detail=detail)
    return None


def _is_fed_otherwise(session: "PairSession", path: str) -> bool:
    """Whether the calls of a module get other inputs, as a norm that takes any scale away may."""
    batch = session.gradient_probe
    calls = compared_calls(session, batch, noise_of_constants(session, batch))
    return any(call.fed is False for call in calls.values() if call.path == path)


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


@dataclasses.dataclass(frozen=True)
class Compared:
    """One call of a module in both models.

    Attributes:
        key: of the call.
        gap: between the outputs; None if they agree.
        fed: whether the inputs agree; None where the first, or all of them, cannot be compared.
        wholly: whether every input can be compared.
        shapes: of the outputs, where they cannot be brought together; else "".
        more: whether the second output holds arrays that the first one has not.
    """

    key: Key
    gap: float | None
    fed: bool | None
    wholly: bool
    shapes: str
    more: bool = False

    @property
    def path(self) -> str:
        """Path of the module."""
        return self.key[0]

    @classmethod
    def of(cls, key: Key, a: Trace, b: Trace, gap: Gap, noise: Noise) -> "Compared":
        """Compare a call in two models."""
        fed, given = noise.get(key, (0.0, 0.0))
        agree = _inputs_agree(a.inputs, b.inputs, beyond(gap, fed))
        is_fed = False if False in agree else agree[0] if agree else True
        found = beyond(gap, given)(a.output, b.output)
        unlike = found is not None and not comparable(a.output, b.output)
        if found is None and (leaf := divergent_leaf(a, b, beyond(gap, given))):
            found = gap(a.outputs[leaf], b.outputs[leaf])
        shapes = f" The shapes are {a.output.shape} and {b.output.shape}." if unlike else ""
        more = len(b.outputs) > len(a.outputs)
        return cls(key, found, is_fed, None not in agree, shapes, more)


def compared(
    a: Iterable[Trace], b: Iterable[Trace], gap: Gap, noise: Noise = _NONE
) -> tuple[list[Compared], Collection[str]]:
    """Return the calls that both models make, and the paths of all that the first one makes."""
    calls: list[Compared] = []
    called: Counter[str] = Counter()
    for trace, twin in matched(a, b):
        if twin is not None:
            calls.append(Compared.of((trace.path, called[trace.path]), trace, twin, gap, noise))
        called[trace.path] += 1
    return calls, called


def divergent_leaf(a: Trace, b: Trace, gap: Gap) -> str | None:
    """Return the path of the first array that differs in two outputs, among those of both."""
    both = (path for path in a.outputs if path in b.outputs)
    return next((path for path in both if gap(a.outputs[path], b.outputs[path]) is not None), None)


def compared_calls(session: "PairSession", batch: Batch, noise: Noise) -> dict[Key, Compared]:
    """Return the calls of a float64 forward pass that both models make."""
    with _both(session, batch) as sides:
        return {call.key: call for call in compared(*sides, float64_gap, noise)[0]}


def first_divergence(
    a: Iterable[Trace],
    b: Iterable[Trace],
    gap: Gap,
    root: str,
    phase: str,
    readers: Readers = lambda key: (),
    noise: Noise = _NONE,
) -> Divergence | None:
    """Return the first module to complete whose output differs although its inputs agree.

    A module is acquitted whose caller's output agrees, or which a later module reads whose inputs
    agree: its output has another layout, or a module of one name has another place.

    Args:
        a: calls of one model.
        b: calls of the other, with the same paths.
        gap: between two arrays.
        root: name of the model itself.
        phase: of the divergence.
        readers: the calls whose inputs depend on what differs in the output of a call.
        noise: what is no difference, by call.

    Returns:
        The caller of a module whose inputs differ while all that completed before it agrees, from
        the inside out as far as inputs differ: it was fed by wrong code outside of modules, in its
        caller's body. None when nothing differs.
    """
    made: set[str] = set()  # paths of all calls of the second model
    calls, called = compared(a, _noted(b, made), gap, noise)
    for place, call in enumerate(calls):
        # Arguments that cannot be compared accuse nobody: the callers, which come later, decide.
        if (
            call.gap is None
            or (call.fed is None and call.path)
            or _acquitted(calls, place, readers)
        ):
            continue
        where, detail = call.path, "Given the same input its output differs"
        if where and not call.fed:
            detail = f"Its own code diverges before {where} is called"
            caller: int | None = place
            while where and caller is not None and not calls[caller].fed:
                if (alone := _around(calls[:place], where, called, made)) is not None:
                    where = alone
                    break
                where, caller = _caller(where, called), _calling(calls, caller)
                if caller is not None and calls[caller].path != where:
                    caller = None  # its calls cannot be compared
        detail += f"; all before {'that' if call.fed is False else 'it'} agrees.{call.shapes}"
        return Divergence(where or root, phase, 0, call.gap, detail=detail)
    return None


def _noted(traces: Iterable[Trace], paths: set[str]) -> Iterator[Trace]:
    """Yield traces and note their paths."""
    for trace in traces:
        paths.add(trace.path)
        yield trace


def _around(
    before: Sequence[Compared], path: str, called: Collection[str], made: Collection[str]
) -> str | None:
    """Return the module of one model alone in whose code an input of a call diverges.

    It is the innermost around the call, before any that both models have, within which another
    call already agreed, or was the first to differ: what leads from there to this call is its code.
    """
    own = _caller(path, made)
    while own and own not in called:
        inside = (call for call in before if _is_inside(call.path, own))
        if any(call.gap is None or call.fed is None for call in inside):
            return own
        own = _caller(own, made)
    return None


def _calling(calls: Sequence[Compared], place: int) -> int | None:
    """Return the place of the call within which another one was made; None where it is unknown."""
    path = calls[place].path
    later = (i for i in range(place + 1, len(calls)) if _is_inside(path, calls[i].path))
    return next(later, None) if path else None


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _acquitted(calls: Sequence[Compared], place: int, readers: Readers) -> bool:
    """Whether a difference does not matter, because what reads it agrees."""
    caller = _calling(calls, place)
    while caller is not None:
        if calls[caller].gap is None:
            return True
        caller = _calling(calls, caller)
    path, unlike = calls[place].path, bool(calls[place].shapes)
    later = {
        call.key
        for call in calls[place + 1 :]
        # What reads an output of another shape after more code decides by its own inputs.
        if ((unlike and call.fed is not None) or (call.fed and call.wholly))
        and not _is_inside(path, call.path)
    }
    return bool(path and later and later & set(readers(calls[place].key)))


def matched(
    a: Iterable[Call], *others: Iterable[Call]
) -> Iterator[tuple[Call, *tuple[Call | None, ...]]]:
    """Yield each trace of `a` with those of the same call of the same module; None where missing.

    The others are read no further than necessary; traces that come early are kept.
    """
    streams = [_numbered(other) for other in others]
    early: list[dict[Key, Call]] = [{} for _ in others]
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
    a, b = together(a, b)
    gap = max_abs(a, b)
    return None if gap <= bounds.MODULE_OUTPUT * scale_of(a) else gap


def together(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two activations in one layout and shape, as far as there is one.

    What one model computes once for all rows of a batch, the other may compute for each.
    """
    other = aligned(b, a)
    if other.shape != a.shape:
        with contextlib.suppress(ValueError):
            a, other = np.broadcast_arrays(a, other)
    return a, other


def unpadded(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two inputs of a module; the larger without zeros at its ends, if it then fits.

    A model may pad what it passes to a convolution that the other model pads inside.
    """
    if a.ndim != b.ndim or a.size == b.size or not 3 <= a.ndim <= 5:
        return a, b
    large, small = (a, b) if a.size > b.size else (b, a)
    for order in itertools.permutations(range(large.ndim)):
        turned = large.transpose(order)
        if any(n < m for n, m in zip(turned.shape, small.shape, strict=True)):
            continue
        nonzero = np.argwhere(turned)
        first = nonzero.min(axis=0) if len(nonzero) else np.zeros(large.ndim, int)
        # The zeros in front are cut first; those that are left lie at the end.
        starts = [min(x, n - m) for x, n, m in zip(first, turned.shape, small.shape, strict=True)]
        cut = turned[tuple(slice(x, x + m) for x, m in zip(starts, small.shape, strict=True))]
        if np.count_nonzero(cut) == np.count_nonzero(turned) and cut.shape == small.shape:
            return (cut, small) if a.size > b.size else (small, cut)
    return a, b


def comparable(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two activations can be compared: their shapes fit, and a mask is none of numbers."""
    if {"b", "f"} == {a.dtype.kind, b.dtype.kind}:
        return False
    a, b = together(a, b)
    return a.shape == b.shape


def aligned(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return an activation with its axes in the order of another framework's, by the best fit.

    Torch has channels after the batch and flax has them last; some have time before the batch, or
    heads before time; heads may share an axis with their width, and rows one with the batch.
    """
    best, smallest = array, math.inf
    for tried in _layouts(array, like.shape):
        found = max_abs(tried, like)
        if found <= bounds.MODULE_OUTPUT * scale_of(like):
            return tried
        if best.shape != like.shape or found < smallest:
            best, smallest = tried, found
    return best


def _layouts(array: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the forms of an activation that have a shape: axes permuted, joined or split."""
    if array.size != math.prod(shape):
        return
    if array.shape == shape:
        yield array
    orders = list(itertools.permutations(range(array.ndim)))[1:] if 3 <= array.ndim <= 5 else []
    for order in orders:
        if tuple(array.shape[axis] for axis in order) == shape:
            yield array.transpose(order)
    if array.ndim == len(shape):
        return
    yield array.reshape(shape)
    if array.ndim >= 3:
        for moved in (np.moveaxis(array, 1, -1), np.moveaxis(array, -1, 1), array.swapaxes(1, 2)):
            yield moved.reshape(shape)


@contextlib.contextmanager
def _both(
    session: "PairSession", batch: Batch
) -> Iterator[tuple[Iterator[Trace], Iterator[Trace]]]:
    """Capture a float64 forward pass of both models, flax's under torch's paths."""
    captures = [functools.partial(run.traces, batch) for run in session.runs("float64")]
    with lockstep(*captures) as (flax, torch):
        yield translated(flax, session.modules), torch


def _inputs_agree(a: Sequence[np.ndarray], b: Sequence[np.ndarray], gap: Gap) -> list[bool | None]:
    """Return of each input whether both models give the same; None where it cannot be compared."""
    if len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return [
            gap(x, y) is None if comparable(x, y) else None
            for x, y in (unpadded(x, y) for x, y in pairs)
        ]
    # Each float of the fewer must be among the others: torch's attention is given its input three
    # times and flax's once.
    few, many = sorted((_floats(a), _floats(b)), key=len)
    found: list[bool | None] = []
    for x in few:
        like = [y for y in many if comparable(x, y)]
        found.append(any(gap(x, y) is None for y in like) if like else None)
    return found


def _numbered(traces: Iterable[Call]) -> Iterator[tuple[Key, Call]]:
    """Yield each trace with the key of its call."""
    seen: Counter[str] = Counter()
    for trace in traces:
        yield (trace.path, seen[trace.path]), trace
        seen[trace.path] += 1
