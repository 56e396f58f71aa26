"""Level `trajectory`: training from the same weights on the same batches gives the same losses."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.check import bounds
from parity.check.metrics import largest, max_abs
from parity.check.noise import Trained, training_noise
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner, Trainer
from parity.report import Divergence
from parity.report.plot_data import LossCurves
from parity.report.record import IMPURE, Record, abstain, first_failed, judge
from parity.system.memory import on_disk

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Compare the two loss curves in each dtype, and in float64 the final weights."""
    if session.pair.flax.trainer is None or session.pair.torch.trainer is None:
        yield abstain("trajectory", "the pair declares no trainer")
        return
    exact: np.ndarray | None = None
    for number, dtype in enumerate(session.dtypes):
        flax, torch = (
            _train(run, session, 2 * number + side) for side, run in enumerate(session.runs(dtype))
        )
        if dtype == "float64" and session.impurities:
            yield abstain("float64", IMPURE)
            exact = session.truth(flax.losses, torch.losses)
            continue
        yield from _compared(session, dtype, flax, torch, exact)
        if exact is None:
            exact = torch.losses


def _compared(
    session: Session[Runner, Runner],
    dtype: str,
    flax: Trained,
    torch: Trained,
    exact: np.ndarray | None,
) -> Iterator[Record]:
    """Compare the losses, and the final weights where no run was more exact."""
    bound, steps = session.float64_bound if exact is None else bounds.LOSS[dtype], session.steps
    ours, theirs = (tuple(side.losses.tolist()) for side in (flax, torch))
    session.plot_data.losses.append(LossCurves(dtype, ours, theirs, bound))
    noise = functools.cache(lambda: training_noise(session, dtype, torch, _untimed))
    gaps = np.abs(flax.losses - torch.losses)
    past, first, note = ~(gaps <= bound), 0, None
    if np.any(past):
        past &= ~(gaps <= bounds.RATIO * noise().losses)
        first = int(np.argmax(past)) + 1 if np.any(past) else 0
        drift = float(noise().losses[-1])
        bound = bound if first else max(bound, bounds.RATIO * drift)
        note = f"loss moves by {drift:.1e} from rounding alone"
        note = f"first past the bound at step {first} of {steps}" if first else note
    seen = None if exact is None else max_abs(torch.losses, exact)
    name, gap = f"loss over {steps} steps", max_abs(flax.losses, torch.losses)
    made = judge(name, dtype, "max_abs", gap, bound, steps, noise=seen, note=note)
    yield made.at(step=first)
    if exact is None:
        theirs = session.weight_map.to_flax(torch.final)
        yield from _final_parameters(session, flax.final, theirs, lambda: noise().final)


def _untimed(run: Runner, session: Session[Runner, Runner]) -> Trained:
    return _train(run, session, None)


def _train(run: Runner, session: Session[Runner, Runner], number: int | None) -> Trained:
    """Return the losses and final weights of a training; its number is for the progress."""
    trainer, losses = session.trainer(run, session.steps), np.empty(session.steps)
    for step in range(session.steps):
        losses[step] = trainer.step(*session.pair.training_batch(step).inputs)
        if number is not None:
            done = number + (step + 1) / session.steps
            session.progress(done / (2 * len(session.dtypes)))
    final = trainer.parameters()
    # On disk it leaves the memory to the training of the other model.
    return Trained(losses, on_disk(final) if session.is_large else final)


def _final_parameters(
    session: Session[Runner, Runner], flax: Leaves, torch: Leaves, noise: Callable[[], Leaves]
) -> Iterator[Record]:
    gaps = {name: max_abs(flax[name], torch[name]) for name in flax}
    judged = gaps.keys() - {*session.null_in_training}
    drifting = []
    for name in (name for name in gaps if name in judged and gaps[name] > bounds.PARAMETERS):
        # The key's third of a fused bias has no gradient, as a key's bias of its own has none.
        gap = np.abs(np.subtract(flax[name], torch[name], dtype=np.float64))
        past = gap > bounds.PARAMETERS
        if name in noise() and np.any(chance := past & (gap <= bounds.CHANCE * noise()[name])):
            gaps[name] = float(np.max(gap, initial=0.0, where=~chance))
            drifting.append(f"{np.count_nonzero(chance)} numbers of {name}")
    null = {name: gaps.pop(name) for name in session.null.leaves}
    drifting += [name for name in session.null_in_training if gaps.pop(name, None) is not None]
    leaf, size = largest(gaps), sum(flax[name].size for name in gaps)
    words = f"moved by rounding in training, not compared: {', '.join(drifting)}"
    name, metric, bound = "final parameters", "max_abs_parameters", bounds.PARAMETERS
    note = words if drifting else None
    made = judge(name, "float64", metric, gaps[leaf], bound, size, note=note)
    yield made.at(leaf, session.steps)
    if null:
        leaf, size = largest(null), sum(flax[name].size for name in null)
        gap = null[leaf] / session.pair.learning_rate
        bound = bounds.NULL_PARAMETERS * session.steps * max(1.0, session.null.gradient_norm)
        note = f"zero up to rounding, judged by the way they can drift: {', '.join(null)}"
        name = "final parameters without a gradient"
        made = judge(name, "float64", "learning_rates", gap, bound, size, note=note)
        yield made.at(leaf, session.steps)


def locate(session: "PairSession", records: list[Record]) -> Divergence | None:
    """Return the first step past the bound, and whether rounding alone could have led there."""
    bad = first_failed(records)
    where, words, cause = bad.where or "the loss curve", "", None
    if not bad.where:
        cause = _idle(session, bad.dtype, bad.step - 1)
        runs = *session.runs(bad.dtype), session.perturbed_run(bad.dtype)
        _, words = rounding_or_bug(
            [run.trainer(session.steps) for run in runs],
            lambda step: session.pair.training_batch(step).inputs,
            bad.step,
            runs[1].name,
        )
    detail = f"In {bad.dtype}, of {session.steps} steps. {words}".rstrip()
    return Divergence(where, "optimizer", bad.step, bad.gap, cause, detail)


def _idle(session: "PairSession", dtype: str, last: int) -> str | None:
    """Describe that one model alone skips the step before its loss diverges; None otherwise."""
    idle = []
    for run in session.runs(dtype) if last else ():
        trainer = run.trainer(session.steps)
        for step in range(last - 1):
            trainer.step(*session.pair.training_batch(step).inputs)
        before = trainer.parameters()
        trainer.step(*session.pair.training_batch(last - 1).inputs)
        after = trainer.parameters()
        if all(np.array_equal(before[name], after[name]) for name in after):
            idle.append(run.name)
    return f"{idle[0]} leaves every weight as it was in step {last}" if len(idle) == 1 else None


def rounding_or_bug(
    trainers: Sequence[Trainer], inputs: Callable[[int], tuple], last: int, name: str
) -> tuple[bool, str]:
    """Tell chaos from a bug by a perturbed run: one twin from weights one rounding away.

    Args:
        trainers: of the two twins and of the second twin's perturbed run, none of them trained.
        inputs: of a step, by its number from 0.
        last: the step, from 1, at which the gap of the twins is judged.
        name: of the second twin.

    Returns:
        Whether it is a bug, and a sentence on what was seen.
    """
    losses = np.array([[x.step(*inputs(step)) for x in trainers] for step in range(last)])
    gaps = np.abs(losses[:, 0] - losses[:, 1])
    before = float(np.max(gaps[:-1], initial=0.0))
    drift = float(np.max(np.abs(losses[:, 2] - losses[:, 1])))
    is_bug = not gaps[-1] <= bounds.CHANCE * drift
    return is_bug, (
        f"Looks like {'a bug' if is_bug else 'rounding'}: the gap was {before:.1e} before and is "
        f"{gaps[-1]:.1e} here, where {name} differs by {drift:.1e} from itself when its weights "
        "start one rounding away."
    )
