"""Training from the same weights on the same batches gives the same losses, step by step."""

from collections.abc import Iterator

import numpy as np

from parity.compare import Record, Verdict, abstain, judge, largest, max_abs
from parity.report import Divergence
from parity.subject import Subject

# Largest gap between two losses. A correct port was measured at 5e-15 over 1,000 steps in float64
# and at 7e-6 in float32, without growth.
FLOAT64, FLOAT32 = 1e-12, 2e-5
# Largest gap between final parameters; rounding in float64 grows with the learning rate per step.
PARAMETERS = 1e-11


def records(subject: Subject) -> Iterator[Record]:
    """The two loss curves in each dtype, and in float64 the weights they end at."""
    if subject.pair.flax.trainer is None or subject.pair.torch.trainer is None:
        yield abstain("trajectory", "the pair declares no trainer")
        return
    parts = 2 * len(subject.dtypes) * subject.steps
    done = 0
    exact: np.ndarray | None = None
    for dtype in subject.dtypes:
        curves, finals = [], []
        for run in subject.runs(dtype):
            trainer = run.trainer()
            losses = np.empty(subject.steps)
            for step in range(subject.steps):
                losses[step] = trainer.step(*subject.pair.training_batch(step).inputs)
                done += 1
                subject.progress(done / parts)
            curves.append(losses)
            finals.append(trainer.parameters())
        flax, torch = curves
        bound = FLOAT64 if dtype == "float64" else FLOAT32
        past = np.flatnonzero(~(np.abs(flax - torch) <= bound))
        first = int(past[0]) + 1 if past.size else 0
        yield judge(
            f"loss over {subject.steps} steps",
            dtype,
            "max_abs",
            max_abs(flax, torch),
            bound,
            subject.steps,
            noise=None if exact is None else max_abs(torch, exact),
            note=f"first past the bound at step {first} of {subject.steps}" if first else None,
            step=first,
        )
        if exact is None:
            exact = torch
            yield _final_parameters(subject, finals[0], subject.weight_map.to_flax(finals[1]))


def _final_parameters(subject: Subject, flax: dict, torch: dict) -> Record:
    gaps = {name: max_abs(flax[name], torch[name]) for name in flax}
    judged = [name for name in gaps if name not in subject.null_leaves]
    leaf = largest({name: gaps[name] for name in judged})
    drift = max((gaps[name] for name in subject.null_leaves), default=None)
    note = None if drift is None else f"null directions drift by {drift:.1e}, not judged"
    return judge(
        "final parameters",
        "float64",
        "max_abs_parameters",
        gaps[leaf],
        PARAMETERS,
        sum(flax[name].size for name in judged),
        note=note,
        where=leaf,
        step=subject.steps,
    )


def locate(subject: Subject, records: list[Record]) -> Divergence | None:
    """The first step past the bound."""
    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    where = bad.where or "the loss curve"
    detail = f"In {bad.dtype}, of {subject.steps} steps."
    return Divergence(where, "optimizer", bad.step, bad.value, detail=detail)
