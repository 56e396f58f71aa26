"""Outputs of two models leaf by leaf: which leaf is which, and how far apart they are."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from parity.check import bounds
from parity.check.metrics import error_ratio, max_abs, rms_error, scale_of, size_of
from parity.check.session import Session
from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.protocols import Runner
from parity.report.record import Record, Verdict, abstain, judge, worst

_NONE = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the outputs of two models, None on a side that lacks it."""

    path: str
    flax: np.ndarray | None
    torch: np.ndarray | None
    flax_path: str
    torch_path: str

    @property
    def words(self) -> str:
        """What records add to the name of a call."""
        return f", output {self.path}" if self.path else ""


def paired(flax: Outputs, torch: Outputs) -> list[Leaf]:
    """Return the leaves of two outputs, those of one path together, in torch's order.

    Leaves of text, which stand for what is no array, are left out. Where one output has positions
    and the other names, leaves without a path in common are paired in their order if their shapes
    fit. An output that is one array and one that holds one array are the same.
    """
    ours, theirs = (
        {path: x for path, x in side.items() if x.dtype.kind != "U"} for side in (flax, torch)
    )
    if len(ours) == len(theirs) == 1 and _same_place(*ours, *theirs):
        path = max(*ours, *theirs)
        path = "" if path.isdigit() else path
        ((our_path, our_array),), ((their_path, their_array),) = ours.items(), theirs.items()
        return [Leaf(path, our_array, their_array, our_path, their_path)]
    found, waiting = [], [path for path in ours if path not in theirs]
    alone = dict.fromkeys(waiting)
    for path, array in theirs.items():
        twin = path if path in ours else None
        if twin is None:
            fitting = (x for x in waiting if ours[x].shape == array.shape and _same_place(x, path))
            if (twin := next(fitting, None)) is not None:
                waiting = waiting[waiting.index(twin) + 1 :]
                del alone[twin]
        other = None if twin is None else ours[twin]
        found.append(Leaf(path, other, array, "" if twin is None else twin, path))
    return found + [Leaf(path, ours[path], None, path, "") for path in alone]


def _same_place(a: str, b: str) -> bool:
    """Whether two paths can be of one leaf: where they differ, one has a position."""
    if not a or not b:
        return True
    pairs = zip(a.split("."), b.split("."), strict=False)
    same = a.count(".") == b.count(".")
    return same and all(x == y or x.isdigit() != y.isdigit() for x, y in pairs)


def output_gap(flax: Outputs, torch: Outputs) -> float:
    """Return the largest difference of float leaves in units of the largest number of the leaf."""
    gaps = [0.0]
    for leaf in paired(flax, torch):
        if leaf.flax is None or leaf.torch is None:
            return math.inf
        a, b = _reals(leaf.flax), _reals(leaf.torch)
        if b.dtype.kind == "f" and a.shape == b.shape:
            kept = np.isfinite(a) | np.isfinite(b)  # NaN of both are equal
            gaps.append(max_abs(a[kept], b[kept]) / max(size_of(b[np.isfinite(b)]), 1e-300))
    return max(gaps)


class Comparison:
    """The outputs of one call of both models, in float64 and then in float32.

    Args:
        session: the models.
        name: of the call in records.
        batch: its arguments.
    """

    def __init__(self, session: Session[Runner, Runner], name: str, batch: Batch):
        self._session, self._name, self._batch = session, name, batch
        self._truths: dict[str, np.ndarray] = {}
        self._agreeing: set[str] = set()  # where float64 decides that both are the same
        self._perturbed = functools.cache(self._perturbed_outputs)
        self._moved = functools.cache(self._moved_outputs)

    def in_float64(self) -> Iterator[Record]:
        """Yield records of each leaf."""
        flax, torch = self._outputs("float64")
        leaves, note = paired(flax, torch), self._excluded(flax, torch)
        if not leaves:
            note = f"nothing was compared; {note or 'the call gave no array'}"
            yield judge(self._name, "float64", "max_abs", math.nan, 0, 0, note=note)
        for leaf in leaves:
            name = self._name + leaf.words
            if leaf.flax is None or leaf.torch is None or leaf.flax.shape != leaf.torch.shape:
                yield _unlike(name, leaf)
                continue
            a, b = _reals(leaf.flax), _reals(leaf.torch)
            self._truths[leaf.path] = self._session.truth(a, b)
            if a.size == 0:
                yield abstain(name, f"empty on both sides: equal shapes {leaf.flax.shape} are all")
            else:
                compared = self._floats if _is_float(a, b) else self._integers
                found = [x.at(leaf.path) for x in compared(leaf, name, a, b, note)]
                yield from found
                if worst(x.verdict for x in found) in (Verdict.PASS, Verdict.TIE):
                    self._agreeing.add(leaf.path)
            note = None

    def in_float32(self) -> Iterator[Record]:
        """Yield the error of each side against float64, and their ratio."""
        for leaf in paired(*self._outputs("float32")):
            truth, name = self._truths.get(leaf.path), self._name + leaf.words
            if truth is None or leaf.flax is None or leaf.torch is None or not truth.size:
                continue  # the record in float64 says why
            a, b = _reals(leaf.flax), _reals(leaf.torch)
            compared = self._narrow_floats if _is_float(a, b) else self._narrow_integers
            for record in compared(leaf, name, a, b, truth):
                yield record.at(leaf.path)

    def in_half(self, dtype: str) -> Iterator[Record]:
        """Yield the ratio of the errors of both models in their own type of 16 bits."""
        note = f"the models are in {dtype}: judged by the ratio of their errors in it to float64"
        unit = bounds.EPSILON_FLOAT16[dtype]
        for leaf in paired(*self._outputs(dtype)):
            truth, name = self._truths.get(leaf.path), self._name + leaf.words
            if truth is None or leaf.flax is None or leaf.torch is None or not truth.size:
                continue
            a, b = _reals(leaf.flax), _reals(leaf.torch)
            if _is_float(a, b):
                kept = np.isfinite(truth)
                a, b, truth = (x[kept].astype(np.float32) for x in (a, b, truth))
                noise = unit * rms_error(truth, np.zeros_like(truth))
                ratio = error_ratio(a, b, truth, noise)
                made = judge(name, dtype, "error_ratio", ratio, bounds.RATIO, a.size, note=note)
                yield made.at(leaf.path)

    def _outputs(self, dtype: str) -> tuple[Outputs, Outputs]:
        flax, torch = (x.outputs(self._batch) for x in self._session.runs(dtype))
        return self._batch.select(flax), self._batch.select(torch)

    def _excluded(self, flax: Outputs, torch: Outputs) -> str | None:
        """Describe what is no part of the comparison."""
        both, leaves = (torch | flax).items(), paired(flax, torch)
        moved = [x for x in leaves if x.flax_path and x.torch_path and x.flax_path != x.torch_path]
        order = ", ".join(f"flax {x.flax_path} as torch {x.torch_path}" for x in moved)
        words = [f"{path or 'the output'} ({x})" for path, x in both if x.dtype.kind == "U"]
        words = [f"not compared, for it is no array: {', '.join(words)}"] if words else []
        words += [f"paired by their order: {order}"] if order else []
        real = self._batch.real
        if real is not None and not real.all():
            padding = np.count_nonzero(~real)
            words.append(f"{padding} of {real.size} positions are padding, not compared")
        return "; ".join(words) or None

    def _floats(
        self, leaf: Leaf, name: str, a: np.ndarray, b: np.ndarray, note: str | None
    ) -> Iterator[Record]:
        """Compare floats by the largest of them, and one by one as float32."""
        kept, words = self._comparable(a, b)
        note = "; ".join(filter(None, (note, words))) or None
        a, b = a[kept], b[kept]
        if not a.size:
            yield judge(name, "float64", "max_abs", math.nan, 0, 0, note=note)
            return
        unit, bound, noise = self._unit(a), self._session.float64_bound, None
        gap = max_abs(a, b) / unit
        if gap > bound and unit < 1.0:  # what is small because it cancels is as large as rounding
            noise = size_of(self._rounded("float64", leaf, kept, b)) / unit
            bound = max(bound, bounds.CHANCE * noise)
        made = judge(name, "float64", "max_abs", gap, bound, a.size, noise=noise, note=note)
        made = self._session.decided(made, lambda number: self._gap_moved(leaf, number) / unit)
        yield made
        if made.bound != bound:  # it did not agree to rounding
            return
        apart, bound = a.astype(np.float32) != b.astype(np.float32), bounds.rounded_apart(a.size)
        if np.count_nonzero(apart) > bound and not self._session.pair.pure:
            apart &= abs(a - b) > bounds.CHANCE * self._rounded("float64", leaf, kept, b)
        flips = int(np.count_nonzero(apart))
        note = f"{flips} of {a.size:,} logits round to another float32" if flips else None
        name = f"{name}, unequal as float32"
        yield judge(name, "float64", "logits", flips, bound, a.size, note=note)

    def _integers(
        self, leaf: Leaf, name: str, a: np.ndarray, b: np.ndarray, note: str | None
    ) -> Iterator[Record]:
        """Compare integers and booleans exactly."""
        made = self._exactly("float64", leaf, name, b, a != b)
        note = "; ".join(filter(None, (note, made.note))) or None
        made = dataclasses.replace(made, note=note)
        # A constant that lifting leaves narrow may flip a choice; how many then says nothing.
        yield self._session.decided(made, lambda number: 0.0)

    def _narrow_integers(
        self, leaf: Leaf, name: str, a: np.ndarray, b: np.ndarray, truth: np.ndarray
    ) -> Iterator[Record]:
        yield self._exactly("float32", leaf, name, truth, (a != truth) | (b != truth))

    def _exactly(
        self, dtype: str, leaf: Leaf, name: str, truth: np.ndarray, apart: np.ndarray
    ) -> Record:
        """Judge where integers are apart; it is a tie where a rounding of the weights does it."""
        count = int(np.count_nonzero(apart))
        made = judge(name, dtype, "different", count, 0, apart.size)
        is_new = dtype == "float64" or leaf.path in self._agreeing
        if not count or self._session.pair.pure or not is_new:
            return made
        rounded = self._rounded(dtype, leaf, np.ones(apart.shape, bool), truth)
        note = f"{count} of {apart.size:,} differ"
        if (rounded[apart] > 0).all():
            note += ", each where a rounding of the weights changes it too"
            return dataclasses.replace(made, verdict=Verdict.TIE, note=note)
        return dataclasses.replace(made, note=note)

    def _narrow_floats(
        self, leaf: Leaf, name: str, a: np.ndarray, b: np.ndarray, truth: np.ndarray
    ) -> Iterator[Record]:
        """Judge floats by the ratio of their errors, and by the size of each."""
        kept, note = self._comparable(a, b)
        a, b, truth = a[kept].astype(np.float32), b[kept].astype(np.float32), truth[kept]
        if not a.size:
            return  # the record in float64 says why
        unit, bound, noise, has_jumps = self._unit(truth), bounds.OUTPUT_FLOAT32, None, False
        fair = error_ratio(a, b, truth)
        gaps = [max_abs(x, truth) / unit for x in (a, b)]
        is_bad = not (fair <= bounds.RATIO and max(gaps) <= bound)
        half = self._session.half_type if is_bad else ""
        if half:
            note, bound = self._session.half_in_places, bounds.OUTPUT_FLOAT16
            noise = bounds.EPSILON_FLOAT16[half] * rms_error(truth, np.zeros_like(truth))
            fair = error_ratio(a, b, truth, noise)
        elif is_bad and not self._session.pair.pure:
            rounded, jumps = self._rounded("float32", leaf, kept, truth), np.zeros(a.shape, bool)
            if leaf.path in self._agreeing:
                errors = np.maximum(abs(a - truth), abs(b - truth))
                floor = max(float(np.median(errors)), bounds.FLOAT32_ROUNDING * size_of(truth))
                jumps |= (errors > bounds.CHANCE * floor) & (errors <= 2 * rounded) & (unit > floor)
                has_jumps = bool(jumps.any())
                a, b, truth, rounded = (x[~jumps] for x in (a, b, truth, rounded))
                if has_jumps:
                    num = f"{np.count_nonzero(jumps)} of {jumps.size:,}"
                    words = f"{num} jump, each where a rounding of the weights makes it jump too"
                    note = "; ".join(filter(None, (note, words)))
                gaps = [max_abs(x, truth) / unit for x in (a, b)]
                if (
                    size_of(rounded) / unit > bound / bounds.OUTPUT_ROUNDINGS
                ):  # as above, of what cancels
                    noise, bound = size_of(rounded) / unit, bounds.CHANCE * size_of(rounded) / unit
            fair = error_ratio(a, b, truth, self._noise(leaf, kept, jumps, truth))
        records = []
        if len(self._session.impurities) < 2:  # else there is no truth to divide by
            records.append(judge(name, "float32", "error_ratio", fair, bounds.RATIO, a.size))
        for run, gap in zip(self._session.runs("float32"), gaps, strict=True):
            named = f"{name}, {run.name}"
            records.append(judge(named, "float32", "max_abs", gap, bound, a.size, noise=noise))
        for record in records:
            is_tie = has_jumps and record.verdict is Verdict.PASS
            yield dataclasses.replace(
                record, verdict=Verdict.TIE if is_tie else record.verdict, note=note
            )

    def _comparable(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, str | None]:
        """Return where numbers can be compared, and what is equal without being finite."""
        every, finite = np.ones(a.shape, bool), np.isfinite(a) & np.isfinite(b)
        if self._session.pair.pure or finite.all():
            return every, None
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            counts = [int(np.count_nonzero(~np.isfinite(x))) for x in (a, b)]
            return every, f"not finite: {counts[0]} in flax, {counts[1]} in torch"
        nan = int(np.count_nonzero(np.isnan(a)))
        num = {"NaN": nan, "infinities": int(np.count_nonzero(~finite)) - nan}
        listed = " and ".join(f"{n} {kind}" for kind, n in num.items() if n)
        return finite, f"{listed} on both sides in the same places"

    def _unit(self, truth: np.ndarray) -> float:
        """Return the size in units of which gaps are judged."""
        size = size_of(truth[np.isfinite(truth)])
        return scale_of(truth) if self._session.pair.pure or not size else size

    def _rounded(self, dtype: str, leaf: Leaf, kept: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """Return how far perturbed runs in a dtype are from each of these numbers.

        In float64 that is from those of the same model, for the other may be wrong.
        """
        if dtype == "float64":
            own = _of_leaf(self._perturbed(dtype, dtype, 0)[0], leaf)
            centre = own[kept].reshape(centre.shape) if own.shape == kept.shape else centre
        return self._farthest(
            self._perturbed(dtype, dtype, bounds.OUTPUT_ROUNDINGS), leaf, kept, centre
        )

    def _noise(self, leaf: Leaf, kept: np.ndarray, jumps: np.ndarray, truth: np.ndarray) -> float:
        """Return the RMS error that rounding weights and inputs to float32 alone makes."""
        outputs, whole = self._perturbed("float32", "float64", 1)[:2], np.zeros(jumps.shape)
        whole[~jumps] = truth
        errors = (self._farthest([x], leaf, kept, whole)[~jumps] for x in outputs)
        return max(rms_error(x, np.zeros_like(x)) for x in errors)

    def _farthest(
        self, runs: list[Outputs], leaf: Leaf, kept: np.ndarray, centre: np.ndarray
    ) -> np.ndarray:
        far = np.zeros(centre.shape)
        for outputs in runs:
            found = _of_leaf(outputs, leaf)
            if found.shape == kept.shape:
                apart = abs(found[kept].reshape(centre.shape).astype(np.float64) - centre)
                far = np.maximum(far, np.nan_to_num(apart))
        return far

    def _perturbed_outputs(self, rounded: str, computed: str, roundings: int) -> list[Outputs]:
        run = self._session.perturbed_outputs
        return [
            run(self._batch, rounded, computed, number, roundings)
            for number in range(bounds.PERTURBED_OUTPUTS if roundings else 1)
        ]

    def _gap_moved(self, leaf: Leaf, number: int) -> float:
        """Return how far constants that lifting leaves narrow move a leaf of one model."""
        path = leaf.torch_path if number else leaf.flax_path
        return max_abs(*(_reals(outputs[path]) for outputs in self._moved(number)))

    def _moved_outputs(self, number: int) -> list[Outputs]:
        runs = self._session.moved_runs[number]
        return [self._batch.select(run.outputs(self._batch)) for run in runs]


def _of_leaf(outputs: Outputs, leaf: Leaf) -> np.ndarray:
    return _reals(outputs.get(leaf.torch_path, outputs.get(leaf.flax_path, _NONE)))


def _is_float(*arrays: np.ndarray) -> bool:
    return any(array.dtype.kind == "f" for array in arrays)


def _reals(array: np.ndarray) -> np.ndarray:
    """Return complex numbers as pairs of real ones, and others as they are."""
    return np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array


def _unlike(name: str, leaf: Leaf) -> Record:
    """Return the failure of a leaf that one side lacks, or has in another shape."""
    shapes = [None if x is None else x.shape for x in (leaf.torch, leaf.flax)]
    words = ["no such output" if shape is None else f"shape {shape}" for shape in shapes]
    note = f"{words[0]} in torch, {words[1]} in flax"
    size = max(1, *(math.prod(shape) for shape in shapes if shape is not None))
    return judge(name, "float64", "max_abs", math.inf, 0, size, note=note).at(leaf.path)
