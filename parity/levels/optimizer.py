"""The optimizers take the same steps: updates, both moments and the count, over three steps.

One step cannot see a wrong beta, because with bias correction Adam's first step does not depend on
them; and parameters hide an update a thousand times smaller than themselves.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from parity.compare import Record, Verdict, error_ratio, judge, max_abs, relative_l2
from parity.leaves import Leaves
from parity.report import Divergence
from parity.subject import Subject

STEPS = 3
# Relative L2 per leaf. An update is a difference of parameters about a thousand times its size, so
# its rounding is a thousand units of the last place, 2e-13.
FLOAT64 = 1e-12
# As for logits: the larger error over the smaller.
RATIO = 4.0
# Largest update of a null leaf, in learning rates. AdamW divides rounding noise by its own size:
# in float32 that makes steps of up to one rate, in float64 epsilon = 1e-8 swallows it.
NULL = {"float64": 1e-4, "float32": 2.0}


# What is compared of a step, and what to call it.
_QUANTITIES = {"update": "update", "first": "first moment", "second": "second moment"}


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one optimizer step did, by leaf."""

    update: Leaves
    first: Leaves
    second: Leaves
    count: int


def records(subject: Subject) -> Iterator[Record]:
    """Quantities by step; float64 names the worst leaf, float32 is judged by ratio to it."""
    exact: list[_Step] = []
    for number, dtype in enumerate(subject.dtypes):
        flax_steps, torch_steps = _steps(subject, dtype)
        for index, (flax, torch) in enumerate(zip(flax_steps, torch_steps, strict=True)):
            step = index + 1
            for quantity in _QUANTITIES:
                a, b = getattr(flax, quantity), getattr(torch, quantity)
                if dtype == "float64":
                    yield _worst_leaf(subject, step, quantity, a, b)
                else:
                    truth = getattr(exact[index], quantity)
                    yield _ratio(subject, step, quantity, a, b, truth)
            gap = abs(flax.count - torch.count)
            yield judge(f"step {step} count", dtype, "difference", gap, 0, 1, step=step)
            if subject.null_leaves:
                rate = subject.pair.learning_rate
                gap = max(max_abs(flax.update[x], torch.update[x]) for x in subject.null_leaves)
                yield judge(
                    f"step {step} null directions",
                    dtype,
                    "learning_rates",
                    gap / rate,
                    NULL[dtype],
                    sum(flax.update[x].size for x in subject.null_leaves),
                    step=step,
                )
        exact = exact or flax_steps
        subject.progress((number + 1) / len(subject.dtypes))


def _steps(subject: Subject, dtype: str) -> tuple[list[_Step], list[_Step]]:
    flax, torch = (run.trainer() for run in subject.runs(dtype))
    to_flax = subject.weight_map.to_flax
    steps = []
    for trainer, convert in ((flax, dict), (torch, to_flax)):
        taken, before = [], convert(trainer.parameters())
        for index in range(STEPS):
            trainer.step(*subject.pair.training_batch(index).inputs)
            after = convert(trainer.parameters())
            first, second, count = trainer.moments()
            update = {name: after[name] - before[name] for name in after}
            taken.append(_Step(update, convert(first), convert(second), count))
            before = after
        steps.append(taken)
    return steps[0], steps[1]


def _worst_leaf(subject: Subject, step: int, quantity: str, a: Leaves, b: Leaves) -> Record:
    gaps = {x: relative_l2(a[x], b[x]) for x in a if x not in subject.null_leaves}
    # NaN has no order, so it must not hide behind a max.
    leaf = max(gaps, key=lambda x: np.inf if np.isnan(gaps[x]) else gaps[x])
    size = sum(a[x].size for x in gaps)
    name = f"step {step} {_QUANTITIES[quantity]}"
    return judge(name, "float64", "relative_l2", gaps[leaf], FLOAT64, size, where=leaf, step=step)


def _ratio(
    subject: Subject, step: int, quantity: str, a: Leaves, b: Leaves, truth: Leaves
) -> Record:
    flat = [
        np.concatenate([x[leaf].ravel() for leaf in a if leaf not in subject.null_leaves])
        for x in (a, b, truth)
    ]
    name = f"step {step} {_QUANTITIES[quantity]}"
    ratio = error_ratio(*flat)
    return judge(name, "float32", "error_ratio", ratio, RATIO, flat[0].size, step=step)


def locate(subject: Subject, records: list[Record]) -> Divergence | None:
    """The first step and quantity that part, and the leaf where most."""
    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    where = bad.where or "the optimizer"
    detail = f"Seen in {bad.name}, {bad.dtype}; all before it agrees."
    return Divergence(where, "optimizer", bad.step, bad.value, detail=detail)
