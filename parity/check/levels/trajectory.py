"""Level `trajectory`: training from the same weights on the same batches gives the same losses."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.check import bounds
from parity.check.causes import explain
from parity.check.metrics import largest, max_abs, size_of
from parity.check.noise import training_noise
from parity.check.session import Session
from parity.frameworks.batch import Batch
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner, Trainer
from parity.report import Divergence
from parity.report.plot_data import LossCurves
from parity.report.record import Record, Verdict, abstain, first_failed, judge
from parity.system.memory import on_disk

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Compare the two loss curves in each dtype, and in float64 the final weights."""
    if session.pair.flax.trainer is None or session.pair.torch.trainer is None:
        yield abstain("trajectory", "the pair declares no trainer")
        return
    if reason := session.weight_map.trained_apart:
        yield abstain("trajectory", reason)
        return
    if session.not_finite:
        names = ", ".join(session.not_finite)
        yield abstain("trajectory", f"the gradient is not finite in either model, at {names}")
        return
    exact: np.ndarray | None = None
    train = functools.partial(_train, session)

    @functools.cache
    def moved(number: int) -> dict[str, float]:
        sides = [train(run) for run in session.moved_runs[number]]
        convert = session.weight_map.to_flax if number else session.weight_map.mapped
        (ours, start), (theirs, final) = sides
        gaps = _final_parameters(session, convert(start), convert(final), dict)
        unit = session.loss_unit(size_of(theirs))
        return {"loss": max_abs(ours, theirs) / unit} | {made.name: made.gap for made in gaps}

    for number, dtype in enumerate(session.dtypes):
        (flax, flax_final), (torch, torch_final) = (
            train(run, 2 * number + side) for side, run in enumerate(session.runs(dtype))
        )
        bound = session.float64_bound if dtype == "float64" else bounds.LOSS[dtype]
        curve = LossCurves(dtype, tuple(flax.tolist()), tuple(torch.tolist()), bound)
        session.plot_data.losses.append(curve)
        trained = torch, torch_final
        rounding = functools.cache(
            functools.partial(training_noise, session, dtype, trained, train)
        )
        unit, name = session.loss_unit(size_of(torch)), f"loss over {session.steps} steps"
        gaps, steps = np.abs(flax - torch) / unit, session.steps
        past = ~(gaps <= bound)
        if np.any(past):
            chance = bounds.CHANCE * rounding()[0] / unit
            if not np.any(past := ~(gaps <= chance) & past):
                bound = max(bound, float(chance[-1]))
        first = int(np.argmax(past)) + 1 if np.any(past) else 0
        note = f"first past the bound at step {first} of {steps}" if first else None
        noise = None if exact is None else max_abs(torch, exact) / unit
        gap = max_abs(flax, torch) / unit
        made = judge(name, dtype, "max_abs", gap, bound, steps, noise=noise, note=note)
        made = session.decided(made, lambda number: moved(number)["loss"])
        yield made.at(step=0 if made.verdict is Verdict.PASS else first)
        if exact is None:
            exact = flax if session.pair.torch.name in session.impurities else torch
            theirs = session.weight_map.to_flax(torch_final)
            ours = session.weight_map.mapped(flax_final)
            for made in _final_parameters(session, ours, theirs, lambda found=rounding: found()[1]):
                yield session.decided(made, lambda number, name=made.name: moved(number)[name])


def _train(
    session: Session[Runner, Runner], run: Runner, number: int | None = None
) -> tuple[np.ndarray, Leaves]:
    """Return the losses and final weights of a training; its number is for the progress."""
    trainer, losses = session.trainer(run, session.steps), np.empty(session.steps)
    for step in range(session.steps):
        batch = session.pair.training_batch(step)
        losses[step] = trainer.step(*batch.inputs, **batch.keywords)
        if number is not None:
            done = number + (step + 1) / session.steps
            session.progress(done / (2 * len(session.dtypes)))
    final = trainer.parameters()
    # On disk it leaves the memory to the training of the other model.
    return losses, on_disk(final) if session.is_large else final


def _final_parameters(
    session: Session[Runner, Runner], flax: Leaves, torch: Leaves, noise: Callable[[], Leaves]
) -> Iterator[Record]:
    gaps = {name: max_abs(flax[name], torch[name]) for name in flax}
    drifting = []
    for name in gaps.keys() - {*session.null_in_training}:
        # The key's third of a fused bias has no gradient, as a key's bias of its own has none.
        if gaps[name] > bounds.PARAMETERS and (drift := noise().get(name)) is not None:
            gap = np.abs(flax[name] - torch[name])
            chance = (gap > bounds.PARAMETERS) & (gap <= bounds.CHANCE * drift)
            if np.any(chance):
                gaps[name] = float(np.max(gap, initial=0.0, where=~chance))
                drifting.append(f"{np.count_nonzero(chance)} numbers of {name}")
    null = {name: gaps.pop(name) for name in session.null.leaves}
    drifting += [name for name in session.null_in_training if gaps.pop(name, None) is not None]
    words = f"moved by rounding in training, not compared: {', '.join(drifting)}"
    note = words if drifting else None
    name, metric, bound = "final parameters", "max_abs_parameters", bounds.PARAMETERS
    if gaps:
        leaf, size = largest(gaps), sum(flax[name].size for name in gaps)
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
    from parity.check.causes.training import explain_step  # as in logits

    bad = first_failed(records)
    where, words, cause = bad.where or "the loss curve", "", None
    if not bad.where:
        cause = _idle(session, bad.dtype, bad.step - 1)
        runs = *session.runs(bad.dtype), session.perturbed_run(bad.dtype)
        _, words = rounding_or_bug(
            [run.trainer(session.steps) for run in runs],
            session.pair.training_batch,
            bad.step,
            runs[1].name,
        )
    detail = f"In {bad.dtype}, of {session.steps} steps. {words}".rstrip()
    found = Divergence(where, "optimizer", bad.step, bad.gap, cause, detail)
    if cause or bad.where or bad.dtype != "float64":
        return found
    return explain(found, lambda found: explain_step(session, found.step) or found)


def _idle(session: "PairSession", dtype: str, last: int) -> str | None:
    """Describe that one model alone skips the step before its loss diverges; None otherwise."""
    idle = []
    for run in session.runs(dtype) if last else ():
        trainer, before = run.trainer(session.steps), Leaves()
        for step in range(last):
            before = trainer.parameters() if step == last - 1 else {}
            batch = session.pair.training_batch(step)
            trainer.step(*batch.inputs, **batch.keywords)
        after = trainer.parameters()
        if all(np.array_equal(before[name], after[name]) for name in after):
            idle.append(run.name)
    return f"{idle[0]} leaves every weight as it was in step {last}" if len(idle) == 1 else None


def rounding_or_bug(
    trainers: Sequence[Trainer], batch_of: Callable[[int], Batch], last: int, name: str
) -> tuple[bool, str]:
    """Tell chaos from a bug by a perturbed run: one twin from weights one rounding away.

    Args:
        trainers: of the two twins and of the second twin's perturbed run, none of them trained.
        batch_of: a step's number, from 0, to its batch.
        last: the step, from 1, at which the gap of the twins is judged.
        name: of the second twin.

    Returns:
        Whether it is a bug, and a sentence on what was seen.
    """
    batches = map(batch_of, range(last))
    losses = np.array([[x.step(*b.inputs, **b.keywords) for x in trainers] for b in batches])
    gaps = np.abs(losses[:, 0] - losses[:, 1])
    before = float(np.max(gaps[:-1], initial=0.0))
    drift = float(np.max(np.abs(losses[:, 2] - losses[:, 1])))
    is_bug = not gaps[-1] <= bounds.CHANCE * drift
    return is_bug, (
        f"Looks like {'a bug' if is_bug else 'rounding'}: the gap was {before:.1e} before and is "
        f"{gaps[-1]:.1e} here, where {name} differs by {drift:.1e} from itself when its weights "
        "start one rounding away."
    )
