"""What rounding alone does to a model: the perturbed runs that judge what is past a bound.

A unit of a ReLU near zero, a maximum with a close second, a sum that cancels or a direction without
a gradient lets rounding show far above the bounds of smooth functions. So a value past its bound
fails only if it is also past what the torch model differs by from itself when its weights start a
few roundings away. A fault moves no model toward itself and gains nothing by that.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from parity.check import bounds
from parity.check.metrics import relative_l2
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner
from parity.report.record import Record, judge


class Trained(NamedTuple):
    """A training: the loss of every step, and the final weights."""

    losses: np.ndarray
    final: Leaves


def perturbed_runs(session: Session[Runner, Runner], dtype: str) -> Iterator[Runner]:
    """Yield the torch model from weights a few roundings away; none for a recording."""
    for seed in range(bounds.PERTURBED_RUNS):
        run = session.perturbed_run(dtype, seed, bounds.ROUNDINGS)
        if run is not None:
            yield run
            run.release()


def judged_by_noise(
    name: str, dtype: str, metric: str, gap: float, bound: float, count: int, noise: float
) -> Record:
    """Return a record that also passes up to `RATIO` times what rounding alone does."""
    if gap <= bound or not noise:
        return judge(name, dtype, metric, gap, bound, count)
    limit = max(bound, bounds.RATIO * noise)
    note = f"{name} is past {bound:g}, but rounding alone moves it by {noise:.1e}"
    return judge(
        name, dtype, metric, gap, limit, count, noise=noise, note=note if gap <= limit else None
    )


def gradient_noise(session: Session[Runner, Runner], dtype: str) -> dict[str, float]:
    """Return by leaf how far rounding moves torch's gradient, relative L2; "" is for the loss."""
    _, (loss, gradients) = session.gradients(dtype)
    noise = dict.fromkeys(["", *gradients], 0.0)
    for run in perturbed_runs(session, dtype):
        moved_loss, moved = run.gradients(session.gradient_probe)
        gaps = {x: relative_l2(g, gradients[x]) for x, g in session.weight_map.flax_leaves(moved)}
        gaps[""] = abs(moved_loss - loss) / max(abs(loss), 1.0)
        noise = {name: max(size, gaps[name]) for name, size in noise.items()}
    return noise


def training_noise(
    session: Session[Runner, Runner],
    dtype: str,
    torch: Trained,
    train: Callable[[Runner, Session[Runner, Runner]], Trained],
) -> Trained:
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
    losses, start = np.zeros_like(torch.losses), move(torch.final)
    final = {name: np.zeros(leaf.shape) for name, leaf in start.items()}
    for run in perturbed_runs(session, dtype):
        moved = train(run, session)
        losses = np.maximum(losses, np.abs(moved.losses - torch.losses))
        for name, leaf in move(moved.final).items():
            gap = np.abs(np.subtract(leaf, start[name], dtype=np.float64))
            final[name] = np.maximum(final[name], gap)
    return Trained(np.maximum.accumulate(losses), final)
