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
            for quantity in ("update", "first", "second"):
                a, b = getattr(flax, quantity), getattr(torch, quantity)
                yield (
                    _worst_leaf(subject, f"step {index + 1} {quantity}", a, b)
                    if dtype == "float64"
                    else _ratio(subject, f"step {index + 1} {quantity}", a, b,
                                getattr(exact[index], quantity))
                )  # fmt: skip
            yield judge(f"step {index + 1} count", dtype, "difference",
                        abs(flax.count - torch.count), 0, 1)  # fmt: skip
            if subject.null_leaves:
                rate = subject.pair.learning_rate
                gap = max(max_abs(flax.update[x], torch.update[x]) for x in subject.null_leaves)
                yield judge(f"step {index + 1} null directions", dtype, "learning_rates",
                            gap / rate, NULL[dtype], len(subject.null_leaves))  # fmt: skip
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


def _worst_leaf(subject: Subject, name: str, a: Leaves, b: Leaves) -> Record:
    gaps = {x: relative_l2(a[x], b[x]) for x in a if x not in subject.null_leaves}
    # NaN has no order, so it must not hide behind a max.
    leaf = max(gaps, key=lambda x: gaps[x] if gaps[x] == gaps[x] else np.inf)
    size = sum(a[x].size for x in gaps)
    return judge(f"{name}, worst at {leaf}", "float64", "relative_l2", gaps[leaf], FLOAT64, size)


def _ratio(subject: Subject, name: str, a: Leaves, b: Leaves, truth: Leaves) -> Record:
    flat_a, flat_b, flat_truth = (
        np.concatenate([x[leaf].ravel() for leaf in a if leaf not in subject.null_leaves])
        for x in (a, b, truth)
    )
    ratio = error_ratio(flat_a, flat_b, flat_truth)
    return judge(name, "float32", "error_ratio", ratio, RATIO, flat_a.size)


def locate(subject: Subject, records: list[Record]) -> Divergence | None:
    """The first step and quantity that part, and the leaf where most."""
    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    step = int(bad.name.split()[1])
    leaf = bad.name.partition(" worst at ")[2]
    quantity = bad.name.split()[2].rstrip(",")
    return Divergence(leaf or "the optimizer", "optimizer", step, bad.value,
                      detail=f"Of the {quantity}.")  # fmt: skip
