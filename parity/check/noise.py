"""What rounding alone does to a model: the perturbed runs that judge what is past a bound.

A unit of a ReLU near zero, a maximum with a close second, a sum that cancels or a direction without
a gradient lets rounding show far above the bounds of smooth functions. So a value past its bound
fails only if it is also past what the torch model differs by from itself when its weights start a
few roundings away. A fault moves no model toward itself and gains nothing by that.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from parity.check import bounds
from parity.check.metrics import relative_l2
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner
from parity.report.record import Record, Verdict


def perturbed_runs(
    session: Session[Runner, Runner], dtype: str, roundings: int
) -> Iterator[Runner]:
    """Yield the torch model from weights some roundings away.

    Yields:
        Runners; none for a recording, nor for a pair that is pure, whose bounds are its own.
    """
    if session.pair.pure:
        return
    for seed in range(bounds.PERTURBED_RUNS):
        run = session.perturbed_run(dtype, seed, roundings)
        if run is not None:
            yield run
            run.release()


def excused(record: Record, noise: Callable[[], float]) -> Record:
    """Return a record that also passes up to `RATIO` times what rounding alone does."""
    if record.verdict is not Verdict.FAIL or record.bound is None or not (moved := noise()):
        return record
    bound = max(record.bound, bounds.RATIO * moved)
    if not record.gap <= bound:
        return dataclasses.replace(record, noise=moved)
    note = f"{record.name} is past {record.bound:g}, but rounding alone moves it by {moved:.1e}"
    note = f"{record.note}; {note}" if record.note else note
    return dataclasses.replace(record, bound=bound, noise=moved, verdict=Verdict.PASS, note=note)


def gradient_noise(session: Session[Runner, Runner], dtype: str) -> dict[str, float]:
    """Return by leaf how far rounding moves torch's gradient, relative L2, and its "loss"."""
    _, (loss, gradients) = session.gradients(dtype)
    noise = dict.fromkeys(["loss", *gradients], 0.0)
    for run in perturbed_runs(session, dtype, bounds.ROUNDINGS):
        moved_loss, moved = run.gradients(session.gradient_probe)
        leaves = session.weight_map.gradients_to_flax(moved).items()
        gaps = {x: relative_l2(g, gradients[x]) for x, g in leaves if x in gradients}
        gaps["loss"] = abs(moved_loss - loss) / max(abs(loss), 1.0)
        noise = {name: max(size, gaps.get(name, 0.0)) for name, size in noise.items()}
    return noise


def training_noise(
    session: Session[Runner, Runner],
    dtype: str,
    torch: tuple[np.ndarray, Leaves],
    train: Callable[[Runner], tuple[np.ndarray, Leaves]],
) -> tuple[np.ndarray, Leaves]:
    """Return the largest gaps of perturbed trainings to torch's.

    Args:
        session: of the models.
        dtype: of the training.
        torch: its losses, and final weights by torch's names.
        train: trains another run.

    Returns:
        The gaps of the losses at each step or before it, and of each number, by flax's names.
    """
    move = session.weight_map.to_flax
    losses, start = np.zeros_like(torch[0]), move(torch[1])
    final = {name: np.zeros(leaf.shape) for name, leaf in start.items()}
    for run in perturbed_runs(session, dtype, 1):  # training makes them more
        moved, leaves = train(run)
        losses = np.maximum(losses, np.abs(moved - torch[0]))
        for name, leaf in move(leaves).items():
            final[name] = np.maximum(final[name], np.abs(leaf - start[name]))
    return np.maximum.accumulate(losses), final
