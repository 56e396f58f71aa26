"""Find why a training diverges where the optimizers do the same: its batch, or its mode."""

import dataclasses

from parity.check import bounds
from parity.check.causes.backward import explain_gradient
from parity.check.causes.forward import explain_output
from parity.check.locate import locate_backward, locate_forward
from parity.check.metrics import relative_l2
from parity.check.pair_session import PairSession
from parity.report import Divergence


def explain_step(session: PairSession, step: int) -> Divergence | None:
    """Return where the models differ on the batch of a step, with the weights before it.

    What the probes do not reach, such as numbers beyond a threshold, a batch may.
    """
    if session.pair.pure:  # its batches are no inputs of a forward pass
        return None
    trainer, batch = session.runs("float64")[0].trainer(session.steps), None
    for number in range(step - 1):
        batch = session.pair.training_batch(number)
        trainer.step(*batch.inputs, **batch.keywords)
    batch = session.pair.training_batch(step - 1)
    weights = trainer.parameters()
    pair = dataclasses.replace(session.pair, probes={"batch": batch}, leaves=weights)
    there = PairSession(pair, session.devices, dtypes=("float64",), seed=session.seed)
    if found := locate_forward(there, batch):
        found = explain_output(there, batch, found)
    else:
        (_, flax), (_, torch) = there.gradients("float64")
        gaps = {x: relative_l2(flax[x], torch[x]) for x in flax if x not in there.null.leaves}
        bad = {x: gap for x, gap in gaps.items() if not gap <= bounds.GRADIENT["float64"]}
        if not bad or (found := locate_backward(there, bad)) is None:
            return None
        found = explain_gradient(there, found)
    detail = f"Seen on the batch of step {step}. {found.detail}"
    return dataclasses.replace(found, step=step, detail=detail)


def explain_mode(session: PairSession) -> str | None:
    """Describe that one model alone computes another loss in training mode; None otherwise."""
    batch, other = session.pair.training_batch(0), []
    for run in session.runs("float64"):
        loss = run.trainer(session.steps).step(*batch.inputs, **batch.keywords)
        still, _ = run.gradients(batch)
        if not abs(loss - still) <= bounds.LOSS["float64"] * max(1.0, abs(still)):
            other.append(run.name)
    if len(other) != 1:
        return None
    return f"{other[0]} alone computes otherwise in training mode, as with a dropout left on"
