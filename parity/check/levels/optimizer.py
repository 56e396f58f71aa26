"""Level `optimizer`: both take the same four steps: losses, updates, moments and the count.

One step cannot see a wrong beta, because with bias correction Adam's first step does not depend on
them; and parameters hide an update a thousand times smaller than themselves.

AdamW divides by the root of the second moment. Where a gradient is nearly zero by cancellation,
that makes a visible part of an update out of rounding, on a correct port. So updates are compared
times that root, which undoes the division; and no single update may be off by much of a learning
rate.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.check import bounds
from parity.check.causes.optimizer import Reading, Step, difference, read, shares
from parity.check.levels.names import HORIZON, OPTIMIZER_STEPS
from parity.check.metrics import largest, max_abs, ratio, relative_l2
from parity.check.session import Session
from parity.frameworks.batch import Batch
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import LiveRunner, Runner, Trainer
from parity.pair.pair import Pair
from parity.report import Divergence
from parity.report.record import IMPURE, Record, Verdict, abstain, judge

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
    count: int

    def update(self, leaf: str) -> np.ndarray:
        """Return the change of a leaf."""
        return self.after[leaf] - self.before[leaf]

    def quantities(self, excluded: tuple[str, ...]) -> dict[str, list[str]]:
        """Return the leaves to compare, by what is compared of them."""
        names = [name for name in self.after if name not in excluded]
        moving = [name for name in names if name in self.second]
        trained = moving or names  # under SGD nothing has moments
        # Running statistics of a batch norm follow weights, null ones too, and are compared as
        # they stand.
        others = [name for name in names if name not in trained]
        compared = {_UPDATE: trained, _FIRST: moving, _SECOND: moving, _STATISTICS: others}
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
    exact: list[_Step] = []
    for number, dtype in enumerate(session.dtypes):
        flax_steps, torch_steps = _steps(session, dtype)
        if not exact:
            exact = flax_steps if session.pair.torch.name in session.impurities else torch_steps
            if session.impurities:
                yield abstain("float64", IMPURE)
                continue
        for step, sides in enumerate(zip(flax_steps, torch_steps, exact, strict=True), 1):
            for made in _compared(session, dtype, *sides):
                yield dataclasses.replace(made, name=f"step {step} {made.name}", step=step)
        session.progress((number + 1) / len(session.dtypes))


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
    yield judge("loss", dtype, "max_abs", abs(flax.loss - torch.loss), bound, 1).at(_LOSS)
    yield judge("count", dtype, "difference", abs(flax.count - torch.count), 0, 1)


def _steps(session: Session[Runner, Runner], dtype: str) -> tuple[list[_Step], list[_Step]]:
    """Take the steps of both sides, one after the other."""
    (flax, torch), limit = session.runs(dtype), SAMPLE_LARGE if session.is_large else SAMPLE
    mapped = session.weight_map.mapped
    ours = _steps_of(
        session.trainer(flax, HORIZON), session.pair, lambda x: mapped(x).items(), limit
    )
    leaves = session.weight_map.flax_leaves
    return ours, _steps_of(session.trainer(torch, HORIZON), session.pair, leaves, limit)


def _steps_of(trainer: Trainer, pair: Pair, leaves: LeavesOf, limit: int) -> list[_Step]:
    def kept(whole: Leaves) -> Leaves:
        return {name: _sample(leaf, limit) for name, leaf in leaves(whole)}

    def moments() -> tuple[Leaves, Leaves, int]:
        first, second, count = trainer.moments()  # gone before the next step, or it must copy them
        return kept(first), kept(second), count

    taken, before = [], kept(trainer.parameters())
    for index in range(OPTIMIZER_STEPS):
        loss = trainer.step(*pair.training_batch(index).inputs)
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
    """Return the ratio of both errors: each the RMS over leaves of the relative L2 error."""

    # Leaves count alike, so that one wrong leaf is not lost among large ones.
    def error(side: _Step) -> float:
        values = ([x.value(quantity, leaf, truth) for x in (side, truth)] for leaf in leaves)
        return float(np.sqrt(np.mean([relative_l2(*pair) ** 2 for pair in values])))

    return ratio(error(flax), error(torch), floor=float(np.finfo(np.float32).eps))


def locate(session: "PairSession", records: list[Record]) -> Divergence | None:
    """Return the first step and quantity that diverge, and the leaf that diverges most."""
    failed = [record for record in records if record.verdict is Verdict.FAIL]
    of_step = [record for record in failed if record.step == failed[0].step]
    # A loss that differs comes before the update that it leads to.
    bad = next((record for record in of_step if record.where == _LOSS), failed[0])
    where = bad.where or "the optimizer"
    detail = f"Seen in {bad.name}, {bad.dtype}; all steps before agree."
    cause = _cause(session) if bad.dtype == "float64" else None
    return Divergence(where, "optimizer", bad.step, bad.gap, cause, detail)


def _cause(session: "PairSession") -> str | None:
    """Describe how the two optimizers differ, each inferred from its own steps alone."""
    pair, (flax, torch) = session.pair, session.runs("float64")
    mapped = session.weight_map.mapped
    readings = _reading(flax, pair, mapped), _reading(torch, pair, session.weight_map.to_flax)
    return difference(*readings, (flax.name, torch.name))


def _reading(run: LiveRunner[object], pair: Pair, convert: Callable[[Leaves], Leaves]) -> Reading:
    """Infer one side's optimizer settings from its first steps."""
    trainer, steps = run.trainer(HORIZON), []
    start = before = trainer.parameters()
    for index in range(OPTIMIZER_STEPS):
        batch = pair.training_batch(index)
        _, gradient = run.at(before).gradients(batch)
        trainer.step(*batch.inputs)
        after, (first, second, _) = trainer.parameters(), trainer.moments()
        steps.append(Step.sampled(*map(convert, (before, after, first, second, gradient))))
        before = after
    reading = read(steps)
    # If the gradient of the full batch does not explain them, try gradients of its equal parts.
    if reading.betas is not None and reading.gradient is None:
        for parts in filter(None, (_parts(pair.training_batch(0), num) for num in _PARTS)):
            gradients = [convert(run.at(start).gradients(part)[1]) for part in parts]
            if mixture := shares(steps[0].first, gradients):
                return dataclasses.replace(reading, shares=mixture)
    return reading


def _parts(batch: Batch, num: int) -> list[Batch]:
    """Split the rows of a batch into equal parts; return none where they do not divide."""
    if any(x.ndim == 0 or len(x) % num for x in batch.inputs):
        return []
    by_part = zip(*(np.split(x, num) for x in batch.inputs), strict=True)
    return [Batch(inputs) for inputs in by_part]
