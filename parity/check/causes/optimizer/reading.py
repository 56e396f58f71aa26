"""All settings that are inferred of one side's optimizer."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from parity.check.bounds import GRADIENT_ROUNDING, MOMENT_ROUNDING
from parity.check.causes.fit import Equations, Number, norm, solve
from parity.check.causes.optimizer.gradient import Gradient, read_gradient
from parity.check.causes.optimizer.step import Step, earlier, sample
from parity.check.causes.optimizer.update import Update, read_update
from parity.frameworks.leaves import Leaves


@dataclasses.dataclass(frozen=True)
class Reading:
    """Inferred settings of one side's optimizer; what nothing explained is None.

    Attributes:
        moves: whether any weight changed.
        remembers: whether moments outlive their step.
        betas: decay of both moments.
        gradient: how the gradient that goes in is made.
        update: how the update is made of the moments.
        shares: of the gradients of equal parts of the batch, where the loss's did not go in.
    """

    moves: bool
    remembers: bool = True
    betas: tuple[Number, Number] | None = None
    gradient: Gradient | None = None
    update: Update | None = None
    shares: tuple[Number, ...] | None = None


def read(steps: Sequence[Step]) -> Reading:
    """Infer an optimizer from its first steps, of which it needs at least three."""
    if not all(step.is_finite for step in steps):
        return Reading(moves=True)
    moves = any(np.any(step.after[x] != step.before[x]) for step in steps for x in step.names)
    if _forgets(steps):
        return Reading(moves, remembers=False)
    if (betas := _betas(steps)) is None:
        return Reading(moves)
    gradient, update = read_gradient(steps, betas[0]), read_update(steps, *betas)
    return Reading(moves, True, betas, gradient, update)


def shares(first: Leaves, parts: Sequence[Leaves]) -> tuple[Number, ...] | None:
    """Return the weights, of sum 1, by which gradients of parts of a batch make the first moment.

    Args:
        first: moments after the first step, as `Step.sampled` keeps them.
        parts: gradients by leaf, whole.

    Returns:
        None when they do not.
    """
    kept = [sample(part) for part in parts]
    whole = norm([norm(m) for m in first.values()])
    found = solve(
        [
            Equations(0, m, tuple(part[name] for part in kept), noise=GRADIENT_ROUNDING * whole)
            for name, m in first.items()
            if m.size
        ]
    )
    if found is None:
        return None
    total = sum(x.value for x in found.shared)
    return tuple(x / Number(total) for x in found.shared)


def _forgets(steps: Sequence[Step]) -> bool:
    """Whether both moments depend on the present gradient alone.

    The second is then the square of the first, but for a factor that is not 1, because each took
    its own share of the gradient; or both are left at zero.
    """
    if not any(np.any(step.first[name]) for step in steps for name in step.names):
        return True
    found = solve(
        [
            Equations(t, v, (step.first[name] ** 2,), noise=MOMENT_ROUNDING * norm(v))
            for t, step in enumerate(steps)
            for name in step.names
            for v in (step.second[name],)
        ]
    )
    return found is not None and found.shared[0].differs(Number(1.0))


def _betas(steps: Sequence[Step]) -> tuple[Number, Number] | None:
    """Infer both betas from the moments alone, whatever the gradient g is.

    With (1 - b1) g_t = m_t - b1 m_{t-1}, the second moment v_t = b2 v_{t-1} + (1 - b2) g_t^2 is
    linear in b2 and in a, -2 a b1 and a b1^2 for a = (1 - b2) / (1 - b1)^2.
    """
    firsts, seconds = [step.first for step in steps], [step.second for step in steps]
    equations = []
    for t, step in enumerate(steps):
        for name in step.names:
            m, v, last = step.first[name], step.second[name], earlier(firsts, t, name)
            terms = earlier(seconds, t, name), m * m, m * last, last * last
            equations.append(Equations(t, v, terms, noise=MOMENT_ROUNDING * norm(v)))
    if (found := solve(equations)) is None:
        return None
    beta2, square, mixed, last = found.shared
    beta1 = mixed / square * Number(-0.5)
    rest1 = Number(1.0 - beta1.value, beta1.error)
    rest2 = Number(1.0 - beta2.value, beta2.error)
    if (last / square).differs(beta1 * beta1) or (square * rest1 * rest1).differs(rest2):
        return None
    return beta1, beta2
