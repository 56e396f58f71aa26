"""Level `optimizer`: both take the same four steps: losses, updates, moments and the count.

One step cannot see a wrong beta, because with bias correction Adam's first step does not depend on
them; and parameters hide an update a thousand times smaller than themselves.

AdamW divides by the root of the second moment. Where a gradient is nearly zero by cancellation,
that makes a visible part of an update out of rounding, on a correct port. So updates are compared
times that root, which undoes the division; and no single update may be off by much of a learning
rate.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from parity.check import bounds
from parity.check.causes import explain
from parity.check.causes.optimizer import Reading, Step, difference, explain_forms, read, shares
from parity.check.levels.names import HORIZON, OPTIMIZER_STEPS
from parity.check.metrics import largest, max_abs, ratio, relative_l2
from parity.check.noise import excused, perturbed_runs
from parity.check.session import Session
from parity.frameworks.batch import Batch
from parity.frameworks.capture import leaves_of, map_leaves
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import LiveRunner, Moments, Runner, Trainer
from parity.pair.pair import Pair
from parity.report import Divergence
from parity.report.record import Record, Verdict, abstain, judge

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession

LeavesOf = Callable[[Leaves], Iterable[tuple[str, np.ndarray]]]

# Numbers of a leaf that are compared, and of a large model's; smaller leaves are compared whole.
SAMPLE, SAMPLE_LARGE = 1 << 16, 1 << 12

_LOSS = "the training loss"
_UPDATE, _FIRST, _SECOND = "update", "first moment", "root of second moment"
_STATISTICS = "statistics"
# Into how many equal parts a batch is cut where the gradient of the whole does not explain a step.
_PARTS = 2, 4


@dataclasses.dataclass(frozen=True)
class _Step:
    """Loss, weights and moments of one optimizer step, by leaf."""

    loss: float
    before: Leaves
    after: Leaves
    first: Leaves
    second: Leaves
    count: int | None

    def with_moments_of(self, other: "_Step") -> Self:
        """Return the step without the moments that the other does not keep."""
        first = {name: leaf for name, leaf in self.first.items() if name in other.first}
        second = {name: leaf for name, leaf in self.second.items() if name in other.second}
        count = None if other.count is None else self.count
        return dataclasses.replace(self, first=first, second=second, count=count)

    def update(self, leaf: str) -> np.ndarray:
        """Return the change of a leaf."""
        return self.after[leaf] - self.before[leaf]

    def quantities(self, excluded: tuple[str, ...]) -> dict[str, list[str]]:
        """Return the leaves to compare, by what is compared of them."""
        names = [name for name in self.after if name not in excluded]
        means, squares = (
            [x for x in names if x in moments] for moments in (self.first, self.second)
        )
        trained = squares or means or names  # under plain SGD nothing has moments
        # Running statistics of a batch norm follow weights, null ones too, and are compared as
        # they stand.
        others = [name for name in names if name not in trained]
        compared = {_UPDATE: trained, _FIRST: means, _SECOND: squares, _STATISTICS: others}
        return {quantity: leaves for quantity, leaves in compared.items() if leaves}

    def value(self, quantity: str, leaf: str, truth: "_Step") -> np.ndarray:
        """Return one quantity of a leaf; updates are times the root of the true second moment."""
        if quantity == _UPDATE:
            return self.update(leaf) * np.sqrt(truth.second.get(leaf, 1.0))
        if quantity == _SECOND:
            return np.sqrt(self.second[leaf])
        return (self.first if quantity == _FIRST else self.after)[leaf]


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Compare quantities by step; float64 by the worst leaf, float32 by ratio of errors to it."""
    if session.pair.flax.trainer is None or session.pair.torch.trainer is None:
        yield abstain("optimizer", "the pair declares no trainer")
        return
    if reason := session.weight_map.trained_apart:
        yield abstain("optimizer", reason)
        return
    if session.not_finite:
        names = ", ".join(session.not_finite)
        yield abstain("optimizer", f"the gradient is not finite in either model, at {names}")
        return
    exact: list[_Step] = []

    @functools.cache
    def noise(number: int) -> dict[str, float]:
        convert = session.weight_map.flax_leaves if number else session.weight_map.own
        ours, theirs = (
            _steps_of(session.trainer(run, HORIZON), session.pair, convert, _limit(session))
            for run in session.moved_runs[number]
        )
        return {x.name: x.gap for x in _all_compared(session, "float64", ours, theirs, exact)}

    @functools.cache
    def perturbed() -> list[list[_Step]]:
        leaves, limit = session.weight_map.flax_leaves, _limit(session)
        return [
            _steps_of(session.trainer(run, HORIZON), session.pair, leaves, limit)
            for run in perturbed_runs(session, "float32", bounds.ROUNDINGS)
        ]

    for number, dtype in enumerate(session.dtypes):
        flax_steps, torch_steps = _steps(session, dtype)
        if not exact:
            exact = flax_steps if session.pair.torch.name in session.impurities else torch_steps
        for made in _all_compared(session, dtype, flax_steps, torch_steps, exact):
            if made.verdict is Verdict.FAIL and dtype == "float32" and not session.pair.pure:
                sides = flax_steps, torch_steps, exact
                unit = session.loss_unit(exact[made.step - 1].loss)
                made = _past_rounding(made, sides, perturbed(), session.null_in_training, unit)
            yield session.decided(made, lambda number, name=made.name: noise(number)[name])
        session.progress((number + 1) / len(session.dtypes))


def _all_compared(
    session: Session[Runner, Runner],
    dtype: str,
    flax: Sequence[_Step],
    torch: Sequence[_Step],
    truth: Sequence[_Step],
) -> Iterator[Record]:
    for step, sides in enumerate(zip(flax, torch, truth, strict=True), 1):
        for made in _compared(session, dtype, *sides):
            yield dataclasses.replace(made, name=f"step {step} {made.name}", step=step)


def _compared(
    session: Session[Runner, Runner], dtype: str, flax: _Step, torch: _Step, truth: _Step
) -> Iterator[Record]:
    """Compare one step."""
    is_exact = dtype == "float64"
    bound = session.float64_bound if is_exact else bounds.LOSS[dtype]
    for quantity, leaves in truth.quantities(session.null_in_training).items():
        size = sum(flax.after[leaf].size for leaf in leaves)
        if is_exact:
            a, b = ({x: side.value(quantity, x, truth) for x in leaves} for side in (flax, torch))
            gaps = {x: relative_l2(a[x], b[x]) for x in leaves}
            leaf = largest(gaps)
            yield judge(quantity, dtype, "relative_l2", gaps[leaf], bound, size).at(leaf)
        else:
            gap = _error_ratio(quantity, leaves, flax, torch, truth)
            yield judge(quantity, dtype, "error_ratio", gap, bounds.RATIO, size)
    judged = flax.after if is_exact else session.null_in_training
    if gaps := {x: max_abs(flax.update(x), torch.update(x)) for x in judged}:
        leaf, size = largest(gaps), sum(flax.after[x].size for x in gaps)
        gap, limit = gaps[leaf] / session.pair.learning_rate, bounds.SINGLE_UPDATE[dtype]
        name = "largest gap of a single update"
        yield judge(name, dtype, "learning_rates", gap, limit, size).at(leaf)
    gap = abs(flax.loss - torch.loss) / session.loss_unit(truth.loss)
    yield judge("loss", dtype, "max_abs", gap, bound, 1).at(_LOSS)
    if flax.count is not None and torch.count is not None:
        yield judge("count", dtype, "difference", abs(flax.count - torch.count), 0, 1)


def _past_rounding(
    record: Record,
    sides: tuple[Sequence[_Step], Sequence[_Step], Sequence[_Step]],
    perturbed: Sequence[Sequence[_Step]],
    excluded: tuple[str, ...],
    unit: float,
) -> Record:
    """Return a failure of float32 as a pass where perturbed runs err as much; see `noise`.

    Args:
        record: the failure.
        sides: steps of flax and torch, and the true ones.
        perturbed: steps of torch from weights some roundings away.
        excluded: leaves that are not compared.
        unit: of the loss.
    """
    at, quantity = record.step - 1, record.name.partition(f"step {record.step} ")[2]
    flax, torch, truth = (side[at] for side in sides)
    moved = [steps[at] for steps in perturbed]
    if quantity == "loss":
        gaps = [abs(x.loss - torch.loss) / unit for x in moved]
        return excused(record, lambda: max(gaps, default=0.0))
    if record.metric != "error_ratio" or not moved:
        return record
    leaves = truth.quantities(excluded)[quantity]
    ours, theirs, *others = (_error(quantity, leaves, x, truth) for x in (flax, torch, *moved))
    gap, noise = ratio(ours, theirs, floor=max(others)), max(others)
    if not gap <= bounds.RATIO:
        return record
    note = f"errors of {ours:.1e} and {theirs:.1e}, where rounding alone makes {noise:.1e}"
    return dataclasses.replace(record, value=gap, noise=noise, verdict=Verdict.PASS, note=note)


def _steps(session: Session[Runner, Runner], dtype: str) -> tuple[list[_Step], list[_Step]]:
    """Take the steps of both sides, one after the other."""
    (flax, torch), limit = session.runs(dtype), _limit(session)
    ours = _steps_of(session.trainer(flax, HORIZON), session.pair, session.weight_map.own, limit)
    leaves = session.weight_map.flax_leaves
    theirs = _steps_of(session.trainer(torch, HORIZON), session.pair, leaves, limit)
    sides = list(zip(ours, theirs, strict=True))
    return [a.with_moments_of(b) for a, b in sides], [b.with_moments_of(a) for a, b in sides]


def _limit(session: Session[Runner, Runner]) -> int:
    return SAMPLE_LARGE if session.is_large else SAMPLE


def _steps_of(trainer: Trainer, pair: Pair, leaves: LeavesOf, limit: int) -> list[_Step]:
    def kept(whole: Leaves) -> Leaves:
        return {name: _sample(leaf, limit) for name, leaf in leaves(whole)}

    def moments() -> Moments:
        first, second, count = trainer.moments()  # gone before the next step, or it must copy them
        return kept(first), kept(second), count

    taken, before = [], kept(trainer.parameters())
    for index in range(OPTIMIZER_STEPS):
        batch = pair.training_batch(index)
        loss = trainer.step(*batch.inputs, **batch.keywords)
        after = kept(trainer.parameters())
        taken.append(_Step(loss, before, after, *moments()))
        before = after
    return taken


def _sample(leaf: np.ndarray, limit: int) -> np.ndarray:
    """Copy a leaf, or `limit` of its numbers, so that steps of a large model fit into memory."""
    if leaf.size <= limit:
        return np.array(leaf)
    # The others are compared at the end of the trajectory.
    return leaf.reshape(-1)[np.random.default_rng(0).integers(leaf.size, size=limit)]


def _error_ratio(
    quantity: str, leaves: Sequence[str], flax: _Step, torch: _Step, truth: _Step
) -> float:
    """Return the ratio of both errors, of which float32's rounding is the least."""
    errors = (_error(quantity, leaves, side, truth) for side in (flax, torch))
    return ratio(*errors, floor=float(np.finfo(np.float32).eps))


def _error(quantity: str, leaves: Sequence[str], side: _Step, truth: _Step) -> float:
    """Return the RMS over leaves of the relative L2 error.

    Leaves count alike, so that one wrong leaf is not lost among large ones.
    """
    values = ([x.value(quantity, leaf, truth) for x in (side, truth)] for leaf in leaves)
    return float(np.sqrt(np.mean([relative_l2(*pair) ** 2 for pair in values])))


def locate(session: "PairSession", records: list[Record]) -> Divergence | None:
    """Return the first step and quantity that diverge, and the leaf that diverges most."""
    failed = [record for record in records if record.verdict is Verdict.FAIL]
    of_step = [record for record in failed if record.step == failed[0].step]
    # A loss that differs comes before the update that it leads to.
    bad = next((record for record in of_step if record.where == _LOSS), failed[0])
    where = bad.where or "the optimizer"
    detail = f"Seen in {bad.name}, {bad.dtype}; all steps before agree."
    found = Divergence(where, "optimizer", bad.step, bad.gap, None, detail)
    if bad.dtype != "float64":
        return found
    return explain(found, lambda found: _explained(session, found))


def _explained(session: "PairSession", found: Divergence) -> Divergence:
    """Return the divergence with its cause: of the optimizers, the statistics, mode or batch."""
    from parity.check.causes.statistics import explain_statistics  # as in logits
    from parity.check.causes.training import explain_mode, explain_step

    cause = _cause(session)
    if cause is None and found.step == 1:
        is_statistic = found.where in session.flax_leaves.keys() - session.null.trained
        cause = explain_statistics(session, found.where) if is_statistic else explain_mode(session)
    if cause is None:
        return explain_step(session, found.step) or found
    return dataclasses.replace(found, cause=cause)


def _cause(session: "PairSession") -> str | None:
    """Describe how the two optimizers differ, each inferred from its own steps alone."""
    pair, (flax, torch) = session.pair, session.runs("float64")
    names = flax.name, torch.name
    converted = (flax, session.weight_map.mapped), (torch, session.weight_map.to_flax)
    flax_steps, torch_steps = (_steps_seen(run, pair, convert) for run, convert in converted)
    if all(step.first and step.second for step in (*flax_steps, *torch_steps)):
        flax_reading, torch_reading = (
            _reading(steps, run, pair, convert)
            for steps, (run, convert) in zip((flax_steps, torch_steps), converted, strict=True)
        )
        if cause := difference(flax_reading, torch_reading, names):
            return cause
    return explain_forms(flax_steps, torch_steps, names)


def _steps_seen(
    run: LiveRunner[object], pair: Pair, convert: Callable[[Leaves], Leaves]
) -> list[Step]:
    """Take the first steps of one side, with the gradient before each."""
    trainer, steps = run.trainer(HORIZON), []
    before = trainer.parameters()
    for index in range(OPTIMIZER_STEPS):
        batch = pair.training_batch(index)
        _, gradient = run.at(before).gradients(batch)
        trainer.step(*batch.inputs, **batch.keywords)
        after, (first, second, _) = trainer.parameters(), trainer.moments()
        steps.append(Step.sampled(*map(convert, (before, after, first, second, gradient))))
        before = after
    return steps


def _reading(
    steps: list[Step], run: LiveRunner[object], pair: Pair, convert: Callable[[Leaves], Leaves]
) -> Reading:
    """Infer one side's optimizer settings from its first steps."""
    reading = read(steps)
    # If the gradient of the full batch does not explain them, try gradients of its equal parts.
    if reading.betas is not None and reading.gradient is None:
        start = run.trainer(HORIZON).parameters()
        for parts in filter(None, (_parts(pair.training_batch(0), num) for num in _PARTS)):
            gradients = [convert(run.at(start).gradients(part)[1]) for part in parts]
            if mixture := shares(steps[0].first, gradients):
                return dataclasses.replace(reading, shares=mixture)
    return reading


def _parts(batch: Batch, num: int) -> list[Batch]:
    """Split the rows of a batch into equal parts; return none where they do not divide."""
    both = batch.inputs, dict(batch.keywords)
    arrays = [x for x in leaves_of(both) if isinstance(x, np.ndarray)]
    if not arrays or any(x.ndim == 0 or len(x) % num for x in arrays):
        return []

    def part(number: int) -> Batch:
        def cut(x: object) -> object:
            return np.split(x, num)[number] if isinstance(x, np.ndarray) else x

        inputs, keywords = map_leaves(both, cut)
        return Batch(inputs, keywords=keywords)

    return [part(number) for number in range(num)]
