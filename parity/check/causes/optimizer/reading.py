"""All settings that are inferred of one side's optimizer."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from parity.check.bounds import GRADIENT_ROUNDING, MOMENT_ROUNDING
from parity.check.causes.fit import Equations, Number, Solution, norm, solve
from parity.check.causes.optimizer.gradient import Gradient, read_gradient
from parity.check.causes.optimizer.step import Step, earlier, sample
from parity.check.causes.optimizer.update import Update, read_update
from parity.frameworks.leaves import Leaves


@dataclasses.dataclass(frozen=True)
class Reading:
    """Inferred settings of one side's optimizer; what nothing explained is None."""

    moves: bool  # whether any weight changed
    remembers: bool = True  # whether moments outlive their step
    betas: tuple[Number, Number] | None = None
    gradient: Gradient | None = None
    update: Update | None = None
    # Of the gradients of equal parts of the batch, where the loss's did not go in.
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
    """Return the weights, of sum 1, that mix gradients of parts of a batch to a moment."""
    kept = [sample(part) for part in parts]  # as `Step.sampled` keeps moments
    noise = GRADIENT_ROUNDING * norm([norm(m) for m in first.values()])
    terms = {name: tuple(part[name] for part in kept) for name, m in first.items() if m.size}
    found = solve([Equations(0, first[name], x, noise=noise) for name, x in terms.items()])
    if found is None:
        return None
    total = Number(sum(x.value for x in found.shared))
    return tuple(x / total for x in found.shared)


def _forgets(steps: Sequence[Step]) -> bool:
    """Whether both moments depend on the present gradient alone, or both are left at zero."""
    if not any(np.any(step.first[name]) for step in steps for name in step.names):
        return True
    # Then the second is the square of the first, but for a factor that is not 1, because each took
    # its own share of the gradient.
    found = _second_moments(steps, lambda m, last_m, last_v: (m * m,))
    return found is not None and found.shared[0].differs(Number(1.0))


def _betas(steps: Sequence[Step]) -> tuple[Number, Number] | None:
    """Infer both betas from the moments alone, whatever the gradient g is."""
    # With (1 - b1) g_t = m_t - b1 m_{t-1}, the second moment v_t = b2 v_{t-1} + (1 - b2) g_t^2 is
    # linear in b2 and in a, -2 a b1 and a b1^2 for a = (1 - b2) / (1 - b1)^2.
    found = _second_moments(steps, lambda m, last, v: (v, m * m, m * last, last * last))
    if found is None:
        return None
    beta2, square, mixed, last = found.shared
    beta1 = mixed / square * Number(-0.5)
    rest1 = Number(1.0 - beta1.value, beta1.error)
    rest2 = Number(1.0 - beta2.value, beta2.error)
    if (last / square).differs(beta1 * beta1) or (square * rest1 * rest1).differs(rest2):
        return None
    return beta1, beta2


def _second_moments(
    steps: Sequence[Step],
    terms: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, ...]],
) -> Solution | None:
    """Explain second moments by terms of the first, and of both one step earlier."""
    firsts, seconds = [step.first for step in steps], [step.second for step in steps]
    equations = []
    for (t, step), name in itertools.product(enumerate(steps), steps[0].names):
        last, v = (earlier(moments, t, name) for moments in (firsts, seconds)), step.second[name]
        noise = MOMENT_ROUNDING * norm(v)
        equations.append(Equations(t, v, terms(step.first[name], *last), noise=noise))
    return solve(equations)
