"""The optimizers take the same four steps: losses, updates, both moments and the count.

One step cannot see a wrong beta, because with bias correction Adam's first step does not depend on
them; and parameters hide an update a thousand times smaller than themselves.

AdamW divides by the root of the second moment. Where a gradient is nearly zero by cancellation,
that makes a visible part of an update out of rounding, on a correct port. So updates are compared
times that root, which undoes the division; and no single update may be off by much of a learning
rate.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity.causes.optimizer import Reading, Step, difference, read, shares
from parity.compare import (
    IMPURE,
    Record,
    Verdict,
    abstain,
    judge,
    largest,
    max_abs,
    ratio,
    relative_l2,
)
from parity.leaves import Leaves
from parity.pair import Batch, Pair
from parity.report import Divergence
from parity.subject import Subject

STEPS = 4
# The steps that the schedule spans: it warms up, stands at its height, and has begun to come down.
HORIZON = 5
# Gap of a step's loss: as on the trajectory.
LOSS = {"float64": 1e-12, "float32": 2e-5}
# Relative L2 per leaf. An update is a difference of parameters about a thousand times its size, so
# its rounding is a thousand units of the last place, 2e-13.
FLOAT64 = 1e-12
# As for logits: the larger error over the smaller.
RATIO = 4.0
# Largest gap of a single update, in learning rates. In float64 AdamW's epsilon of 1e-8 swallows
# noise of 1e-16; in float32 it makes steps of up to one rate out of it, so that null leaves, the
# only ones judged so there, may go either way and no further.
SINGLE = {"float64": 1e-4, "float32": 2.0}

_LOSS = "the training loss"
# Numbers of equal parts of a batch whose gradients are tried where the whole batch's did not go in.
_PARTS = 2, 4


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one optimizer step did, by leaf."""

    loss: float
    after: Leaves
    update: Leaves
    first: Leaves
    second: Leaves
    count: int

    def comparable(self, truth: "_Step", excluded: tuple[str, ...]) -> dict[str, Leaves]:
        """What is compared, by name; updates are weighted by the root of the true second moment.

        Under SGD nothing has moments. Beside them, the running statistics of a batch norm have
        none: they follow weights, null ones too, and are compared as they stand.
        """
        names = [name for name in self.update if name not in excluded]
        trained = [name for name in names if name in truth.second] or names
        moving = [name for name in trained if name in truth.second]
        compared = {
            "update": {x: self.update[x] * np.sqrt(truth.second.get(x, 1.0)) for x in trained},
            "first moment": {x: self.first[x] for x in moving},
            "root of second moment": {x: np.sqrt(self.second[x]) for x in moving},
            "statistics": {x: self.after[x] for x in names if x not in trained},
        }
        return {quantity: leaves for quantity, leaves in compared.items() if leaves}


def records(subject: Subject) -> Iterator[Record]:
    """Quantities by step; float64 names the worst leaf, float32 is judged by ratio to it."""
    if subject.pair.flax.trainer is None or subject.pair.torch.trainer is None:
        yield abstain("optimizer", "the pair declares no trainer")
        return
    exact: list[_Step] = []
    for number, dtype in enumerate(subject.dtypes):
        flax_steps, torch_steps = _steps(subject, dtype)
        if not exact:
            exact = flax_steps if subject.pair.torch.name in subject.impurities else torch_steps
            if subject.impurities:
                yield abstain("float64", IMPURE)
                continue
        for index, (flax, torch) in enumerate(zip(flax_steps, torch_steps, strict=True)):
            step = index + 1
            a, b, truth = (
                x.comparable(exact[index], subject.null_in_training)
                for x in (flax, torch, exact[index])
            )
            for quantity in truth:
                name, leaves = f"step {step} {quantity}", truth[quantity]
                size = sum(leaf.size for leaf in leaves.values())
                if dtype == "float64":
                    leaf, gap = _worst_leaf(a[quantity], b[quantity])
                    yield judge(
                        name, dtype, "relative_l2", gap, FLOAT64, size, where=leaf, step=step
                    )
                else:
                    gap = _error_ratio(a[quantity], b[quantity], leaves)
                    yield judge(name, dtype, "error_ratio", gap, RATIO, size, step=step)
            judged = flax.update if dtype == "float64" else subject.null_in_training
            gaps = {x: max_abs(flax.update[x], torch.update[x]) for x in judged}
            if gaps:
                leaf = largest(gaps)
                yield judge(
                    f"step {step} largest gap of a single update",
                    dtype,
                    "learning_rates",
                    gaps[leaf] / subject.pair.learning_rate,
                    SINGLE[dtype],
                    sum(flax.update[x].size for x in gaps),
                    where=leaf,
                    step=step,
                )
            gap = abs(flax.loss - torch.loss)
            yield judge(f"step {step} loss", dtype, "max_abs", gap, LOSS[dtype], 1,
                        where=_LOSS, step=step)  # fmt: skip
            gap = abs(flax.count - torch.count)
            yield judge(f"step {step} count", dtype, "difference", gap, 0, 1, step=step)
        subject.progress((number + 1) / len(subject.dtypes))


def _steps(subject: Subject, dtype: str) -> tuple[list[_Step], list[_Step]]:
    flax, torch = (run.trainer(HORIZON) for run in subject.runs(dtype))
    steps = []
    for trainer, convert in ((flax, dict), (torch, subject.weight_map.to_flax)):
        taken, before = [], convert(trainer.parameters())
        for index in range(STEPS):
            loss = trainer.step(*subject.pair.training_batch(index).inputs)
            after = convert(trainer.parameters())
            first, second, count = trainer.moments()
            update = {name: after[name] - before[name] for name in after}
            taken.append(_Step(loss, after, update, convert(first), convert(second), count))
            before = after
        steps.append(taken)
    return steps[0], steps[1]


def _worst_leaf(a: Leaves, b: Leaves) -> tuple[str, float]:
    gaps = {name: relative_l2(a[name], b[name]) for name in a}
    leaf = largest(gaps)
    return leaf, gaps[leaf]


def _error_ratio(a: Leaves, b: Leaves, truth: Leaves) -> float:
    """The larger error over the smaller: each the RMS over leaves of the relative L2 error.

    Leaves count alike, so that one wrong leaf is not lost among large ones.
    """
    errors = [
        float(np.sqrt(np.mean([relative_l2(x[name], truth[name]) ** 2 for name in truth])))
        for x in (a, b)
    ]
    return ratio(*errors, floor=float(np.finfo(np.float32).eps))


def locate(subject: Subject, records: list[Record]) -> Divergence | None:
    """The first step and quantity that part, and the leaf where most."""
    failed = [record for record in records if record.verdict is Verdict.FAIL]
    of_step = [record for record in failed if record.step == failed[0].step]
    # A loss that differs comes before the update that it leads to.
    bad = next((record for record in of_step if record.where == _LOSS), failed[0])
    where = bad.where or "the optimizer"
    detail = f"Seen in {bad.name}, {bad.dtype}; all steps before agree."
    cause = _cause(subject) if bad.dtype == "float64" else None
    return Divergence(where, "optimizer", bad.step, bad.value, cause, detail)


def _cause(subject: Subject) -> str | None:
    """What the two optimizers are seen to do differently, each judged by its own steps alone."""
    pair, (flax, torch) = subject.pair, subject.runs("float64")
    readings = _reading(flax, pair, dict), _reading(torch, pair, subject.weight_map.to_flax)
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
