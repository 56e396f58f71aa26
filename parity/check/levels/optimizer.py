"""The optimizers take the same four steps: losses, updates, both moments and the count.

One step cannot see a wrong beta, because with bias correction Adam's first step does not depend on
them; and parameters hide an update a thousand times smaller than themselves.

AdamW divides by the root of the second moment. Where a gradient is nearly zero by cancellation,
that makes a visible part of an update out of rounding, on a correct port. So updates are compared
times that root, which undoes the division; and no single update may be off by much of a learning
rate.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from parity.check.causes.optimizer import Reading, Step, difference, read, shares
from parity.check.levels.logits import float64_bound
from parity.check.metrics import largest, max_abs, ratio, relative_l2
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import Batch
from parity.pair.pair import Pair
from parity.report import Divergence
from parity.report.record import IMPURE, Record, Verdict, abstain, judge

STEPS = 4
# The steps that the schedule spans: it warms up, stands at its height, and has begun to come down.
HORIZON = 5
# Gap of a step's loss in float32: as on the trajectory.
LOSS = 2e-5
# Numbers of a leaf that are compared, and of a large model's; smaller leaves are compared whole.
SAMPLE, SAMPLE_LARGE = 1 << 16, 1 << 12
# In float64 the bound is that of logits, which is wider for a large model; relative L2 per leaf. An
# update is a difference of parameters about a thousand times its size, so its rounding is a
# thousand units of the last place, 2e-13. GPT-2's 124 million parameters were measured at 4.5e-12,
# and at 3e-12 for the loss of the fourth step.
# As for logits: the larger error over the smaller.
RATIO = 4.0
# Largest gap of a single update, in learning rates. In float64 AdamW's epsilon of 1e-8 swallows
# noise of 1e-16; in float32 it makes steps of up to one rate out of it, so that null leaves, the
# only ones judged so there, may go either way and no further.
SINGLE = {"float64": 1e-4, "float32": 2.0}

_LOSS = "the training loss"
_UPDATE, _FIRST, _SECOND = "update", "first moment", "root of second moment"
_STATISTICS = "statistics"
# Numbers of equal parts of a batch whose gradients are tried where the whole batch's did not go in.
_PARTS = 2, 4


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one optimizer step did, by leaf."""

    loss: float
    before: Leaves
    after: Leaves
    first: Leaves
    second: Leaves
    count: int

    def update(self, leaf: str) -> np.ndarray:
        return self.after[leaf] - self.before[leaf]

    def quantities(self, excluded: tuple[str, ...]) -> dict[str, list[str]]:
        """What is compared, by name, and of which leaves.

        Under SGD nothing has moments. Beside them, the running statistics of a batch norm have
        none: they follow weights, null ones too, and are compared as they stand.
        """
        names = [name for name in self.after if name not in excluded]
        trained = [name for name in names if name in self.second] or names
        moving = [name for name in trained if name in self.second]
        compared = {
            _UPDATE: trained,
            _FIRST: moving,
            _SECOND: moving,
            _STATISTICS: [name for name in names if name not in trained],
        }
        return {quantity: leaves for quantity, leaves in compared.items() if leaves}

    def value(self, quantity: str, leaf: str, truth: "_Step") -> np.ndarray:
        """One leaf of one of these; updates are weighted by the root of the true second moment."""
        if quantity == _UPDATE:
            return self.update(leaf) * np.sqrt(truth.second.get(leaf, 1.0))
        if quantity == _SECOND:
            return np.sqrt(self.second[leaf])
        return (self.first if quantity == _FIRST else self.after)[leaf]


def records(session: Session) -> Iterator[Record]:
    """Quantities by step; float64 names the worst leaf, float32 is judged by ratio to it."""
    if session.pair.flax.trainer is None or session.pair.torch.trainer is None:
        yield abstain("optimizer", "the pair declares no trainer")
        return
    exact: list[_Step] = []
    bound = float64_bound(session)
    for number, dtype in enumerate(session.dtypes):
        flax_steps, torch_steps = _steps(session, dtype)
        if not exact:
            exact = flax_steps if session.pair.torch.name in session.impurities else torch_steps
            if session.impurities:
                yield abstain("float64", IMPURE)
                continue
        for index, (flax, torch) in enumerate(zip(flax_steps, torch_steps, strict=True)):
            step, truth = index + 1, exact[index]
            for quantity, leaves in truth.quantities(session.null_in_training).items():
                name = f"step {step} {quantity}"
                size = sum(flax.after[leaf].size for leaf in leaves)
                if dtype == "float64":
                    gaps = {
                        leaf: relative_l2(*(x.value(quantity, leaf, truth) for x in (flax, torch)))
                        for leaf in leaves
                    }
                    leaf = largest(gaps)
                    yield judge(name, dtype, "relative_l2", gaps[leaf], bound, size,
                                where=leaf, step=step)  # fmt: skip
                else:
                    gap = _error_ratio(quantity, leaves, flax, torch, truth)
                    yield judge(name, dtype, "error_ratio", gap, RATIO, size, step=step)
            judged = flax.after if dtype == "float64" else session.null_in_training
            gaps = {x: max_abs(flax.update(x), torch.update(x)) for x in judged}
            if gaps:
                leaf = largest(gaps)
                yield judge(
                    f"step {step} largest gap of a single update",
                    dtype,
                    "learning_rates",
                    gaps[leaf] / session.pair.learning_rate,
                    SINGLE[dtype],
                    sum(flax.after[x].size for x in gaps),
                    where=leaf,
                    step=step,
                )
            gap, loss_bound = abs(flax.loss - torch.loss), LOSS if dtype == "float32" else bound
            yield judge(f"step {step} loss", dtype, "max_abs", gap, loss_bound, 1,
                        where=_LOSS, step=step)  # fmt: skip
            gap = abs(flax.count - torch.count)
            yield judge(f"step {step} count", dtype, "difference", gap, 0, 1, step=step)
        session.progress((number + 1) / len(session.dtypes))


def _steps(session: Session, dtype: str) -> tuple[list[_Step], list[_Step]]:
    """The steps of both sides, one after the other."""
    steps = []
    sides = zip(session.runs(dtype), (dict.items, session.weight_map.flax_leaves), strict=True)
    for run, leaves in sides:
        limit = SAMPLE_LARGE if session.is_large else SAMPLE
        steps.append(_steps_of(session.trainer(run, HORIZON), session.pair, leaves, limit))
    return steps[0], steps[1]


def _steps_of(trainer: Any, pair: Pair, leaves: Callable, limit: int) -> list[_Step]:
    def kept(whole: Leaves) -> Leaves:
        return {name: _sample(leaf, limit) for name, leaf in leaves(whole)}

    def moments() -> tuple[Leaves, Leaves, int]:
        first, second, count = trainer.moments()  # gone before the next step, or it must copy them
        return kept(first), kept(second), count

    taken, before = [], kept(trainer.parameters())
    for index in range(STEPS):
        loss = trainer.step(*pair.training_batch(index).inputs)
        after = kept(trainer.parameters())
        taken.append(_Step(loss, before, after, *moments()))
        before = after
    return taken


def _sample(leaf: np.ndarray, limit: int) -> np.ndarray:
    """A copy of the leaf, or of so many of its numbers that steps of a large model fit into memory.

    The others are compared at the end of the trajectory.
    """
    if leaf.size <= limit:
        return np.array(leaf)
    return leaf.reshape(-1)[np.random.default_rng(0).integers(leaf.size, size=limit)]


def _error_ratio(
    quantity: str, leaves: Sequence[str], flax: _Step, torch: _Step, truth: _Step
) -> float:
    """The larger error over the smaller: each the RMS over leaves of the relative L2 error.

    Leaves count alike, so that one wrong leaf is not lost among large ones.
    """
    squares = [
        [
            relative_l2(x.value(quantity, leaf, truth), truth.value(quantity, leaf, truth)) ** 2
            for x in (flax, torch)
        ]
        for leaf in leaves
    ]
    errors = np.sqrt(np.mean(squares, axis=0))
    return ratio(*map(float, errors), floor=float(np.finfo(np.float32).eps))


def locate(session: Session, records: list[Record]) -> Divergence | None:
    """The first step and quantity that part, and the leaf where most."""
    failed = [record for record in records if record.verdict is Verdict.FAIL]
    of_step = [record for record in failed if record.step == failed[0].step]
    # A loss that differs comes before the update that it leads to.
    bad = next((record for record in of_step if record.where == _LOSS), failed[0])
    where = bad.where or "the optimizer"
    detail = f"Seen in {bad.name}, {bad.dtype}; all steps before agree."
    cause = _cause(session) if bad.dtype == "float64" else None
    return Divergence(where, "optimizer", bad.step, bad.value, cause, detail)


def _cause(session: Session) -> str | None:
    """What the two optimizers are seen to do differently, each judged by its own steps alone."""
    pair, (flax, torch) = session.pair, session.runs("float64")
    readings = _reading(flax, pair, dict), _reading(torch, pair, session.weight_map.to_flax)
    return difference(*readings, (flax.name, torch.name))


def _reading(run: Any, pair: Pair, convert: Callable[[Leaves], Leaves]) -> Reading:
    """One side's optimizer, read off; what its loss's gradient does not explain, by parts of it."""
    trainer, steps = run.trainer(HORIZON), []
    start = before = trainer.parameters()
    for index in range(STEPS):
        batch = pair.training_batch(index)
        _, gradient = run.at(before).gradients(batch)
        trainer.step(*batch.inputs)
        after, (first, second, _) = trainer.parameters(), trainer.moments()
        steps.append(Step.sampled(*map(convert, (before, after, first, second, gradient))))
        before = after
    reading = read(steps)
    if reading.betas is not None and reading.gradient is None:
        for parts in filter(None, (_parts(pair.training_batch(0), num) for num in _PARTS)):
            gradients = [convert(run.at(start).gradients(part)[1]) for part in parts]
            if mixture := shares(steps[0].first, gradients):
                return dataclasses.replace(reading, shares=mixture)
    return reading


def _parts(batch: Batch, num: int) -> list[Batch]:
    """The rows of a batch in equal parts; none where they do not divide."""
    if any(x.ndim == 0 or len(x) % num for x in batch.inputs):
        return []
    by_part = zip(*(np.split(x, num) for x in batch.inputs), strict=True)
    return [Batch(inputs) for inputs in by_part]
