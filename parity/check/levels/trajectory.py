"""Training from the same weights on the same batches gives the same losses, step by step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from parity.check.levels.logits import float64_bound
from parity.check.metrics import largest, max_abs
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.report import Divergence
from parity.report.plot_data import LossCurves
from parity.report.record import IMPURE, Record, Verdict, abstain, judge
from parity.system.memory import on_disk

# Largest gap between two losses. A correct port was measured at 5e-15 over 1,000 steps in float64
# and at 7e-6 in float32, without growth. For a large model it is wider in float64, as for logits.
FLOAT64, FLOAT32 = 1e-12, 2e-5
# Largest gap between final parameters; rounding in float64 grows with the learning rate per step.
PARAMETERS = 1e-11
# And between those whose gradient is only rounding, in learning rates times steps: noise of 1e-16
# of the whole gradient, which AdamW divides by its epsilon of 1e-8, every time the same way.
NULL = 1e-8
# Two runs that start one rounding apart part by chance, and this much more may be chance too.
CHANCE = 100.0


def records(session: Session) -> Iterator[Record]:
    """The two loss curves in each dtype, and in float64 the weights they end at."""
    if session.pair.flax.trainer is None or session.pair.torch.trainer is None:
        yield abstain("trajectory", "the pair declares no trainer")
        return
    exact: np.ndarray | None = None
    for number, dtype in enumerate(session.dtypes):
        sides = enumerate(session.runs(dtype))
        trained = [_train(run, session, 2 * number + side) for side, run in sides]
        (flax, flax_final), (torch, torch_final) = trained
        if dtype == "float64" and session.impurities:
            yield abstain("float64", IMPURE)
            exact = session.truth(flax, torch)
            continue
        bound = float64_bound(session) if dtype == "float64" else FLOAT32
        curve = LossCurves(dtype, tuple(flax.tolist()), tuple(torch.tolist()), bound)
        session.evidence.losses.append(curve)
        past = np.flatnonzero(~(np.abs(flax - torch) <= bound))
        first = int(past[0]) + 1 if past.size else 0
        yield judge(
            f"loss over {session.steps} steps",
            dtype,
            "max_abs",
            max_abs(flax, torch),
            bound,
            session.steps,
            noise=None if exact is None else max_abs(torch, exact),
            note=f"first past the bound at step {first} of {session.steps}" if first else None,
            step=first,
        )
        if exact is None:
            exact = torch
            yield from _final_parameters(
                session, flax_final, session.weight_map.to_flax(torch_final)
            )


def _train(run: Any, session: Session, part: int) -> tuple[np.ndarray, Leaves]:
    """The losses of one side, and the weights that it ends at.

    Args:
        part: number of this training among those of all sides and types.
    """
    trainer, losses = session.trainer(run, session.steps), np.empty(session.steps)
    for step in range(session.steps):
        losses[step] = trainer.step(*session.pair.training_batch(step).inputs)
        done = part + (step + 1) / session.steps
        session.progress(done / (2 * len(session.dtypes)))
    final = trainer.parameters()
    # Out of the way of the other side's training.
    return losses, on_disk(final) if session.is_large else final


def _final_parameters(session: Session, flax: Leaves, torch: Leaves) -> Iterator[Record]:
    gaps = {name: max_abs(flax[name], torch[name]) for name in flax}
    null = {name: gaps.pop(name) for name in session.null_leaves}
    adrift = [name for name in session.null_in_training if gaps.pop(name, None) is not None]
    leaf = largest(gaps)
    yield judge(
        "final parameters",
        "float64",
        "max_abs_parameters",
        gaps[leaf],
        PARAMETERS,
        sum(flax[name].size for name in gaps),
        note=f"moved by rounding in training, not compared: {', '.join(adrift)}"
        if adrift
        else None,
        where=leaf,
        step=session.steps,
    )
    if null:
        leaf = largest(null)
        yield judge(
            "final parameters without a gradient",
            "float64",
            "learning_rates",
            null[leaf] / session.pair.learning_rate,
            NULL * session.steps * max(1.0, session.gradient_norm),
            sum(flax[name].size for name in null),
            note=f"zero up to rounding, judged by the way they can drift: {', '.join(null)}",
            where=leaf,
            step=session.steps,
        )


def locate(session: Session, records: list[Record]) -> Divergence | None:
    """The first step past the bound, and whether rounding alone could have led there."""
    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    where, words, cause = bad.where or "the loss curve", "", None
    if not bad.where:
        cause = _idle(session, bad.dtype, bad.step - 1)
        runs = *session.runs(bad.dtype), session.witness(bad.dtype)
        _, words = rounding_or_bug(
            [run.trainer(session.steps) for run in runs],
            lambda step: session.pair.training_batch(step).inputs,
            bad.step,
            runs[1].name,
        )
    detail = f"In {bad.dtype}, of {session.steps} steps. {words}".rstrip()
    return Divergence(where, "optimizer", bad.step, bad.value, cause, detail)


def _idle(session: Session, dtype: str, last: int) -> str | None:
    """Whether one side alone skips the step before its loss parts, in words."""
    idle = []
    for run in session.runs(dtype) if last else ():
        trainer = run.trainer(session.steps)
        for step in range(last):
            before = trainer.parameters()
            trainer.step(*session.pair.training_batch(step).inputs)
        after = trainer.parameters()
        if all(np.array_equal(before[name], after[name]) for name in after):
            idle.append(run.name)
    return f"{idle[0]} leaves every weight as it was in step {last}" if len(idle) == 1 else None


def rounding_or_bug(
    trainers: Sequence[Any], inputs: Callable[[int], tuple], last: int, name: str
) -> tuple[bool, str]:
    """Tells chaos from a bug by a witness: one twin again, from weights one rounding away.

    Args:
        trainers: of the two twins and of the witness, which is the second twin nudged; all fresh.
        inputs: of a step, by its number from 0.
        last: the step, from 1, at which the gap of the twins is judged.
        name: of the second twin.

    Returns:
        Whether it is a bug, and what was seen, in words.
    """
    losses = np.array(
        [[trainer.step(*inputs(step)) for trainer in trainers] for step in range(last)]
    )
    gaps = np.abs(losses[:, 0] - losses[:, 1])
    before = float(np.max(gaps[:-1], initial=0.0))
    drift = float(np.max(np.abs(losses[:, 2] - losses[:, 1])))
    is_bug = not gaps[-1] <= CHANCE * drift
    return is_bug, (
        f"Looks like {'a bug' if is_bug else 'rounding'}: the gap was {before:.1e} before and is "
        f"{gaps[-1]:.1e} here, where {name} parts by {drift:.1e} from itself when its weights "
        "start one rounding away."
    )
