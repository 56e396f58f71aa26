"""How the gradient that reaches an optimizer's moments follows from that of the loss."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from parity.check.bounds import GRADIENT_ROUNDING
from parity.check.causes import fit
from parity.check.causes.fit import Equations, Number, norm, solve
from parity.check.causes.optimizer.step import Step, earlier
from parity.frameworks.leaves import Leaves

_ONE = Number(1.0)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """The gradient that reaches the moments, in terms of the loss's; what is unknown is None."""

    clip_norm: Number | None = None  # largest norm that passes; infinite when no step was clipped
    clip_epsilon: Number | None = None  # added to the norm that divides
    factor: Number | None = None  # that the gradient is multiplied by, whatever its norm
    decay: Mapping[str, Number] = dataclasses.field(default_factory=dict)  # L2, by leaf
    carried: bool = False  # whether it still contains gradients of earlier steps


def read_gradient(steps: Sequence[Step], beta1: Number) -> Gradient | None:
    """Try the loss's gradient alone, then with decay of the weights, then with earlier ones."""
    taken = _taken(steps, beta1.value)
    norms = [step.norm for step in steps]
    if found := solve(_equations(steps, taken)):
        return _clipping([factor for (factor,) in found.by_step], norms)
    if found := solve(_equations(steps, taken, decays=True)):
        factors = [factor for (factor,) in found.by_step]
        if (decay := _decay(steps, taken, factors)) is None:
            return None
        return dataclasses.replace(_clipping(factors, norms), decay=decay)
    return Gradient(carried=True) if solve(_equations(steps, taken, carries=True)) else None


def _taken(steps: Sequence[Step], beta1: float) -> list[Leaves]:
    """Return the gradients that went in, (m_t - b1 m_{t-1}) / (1 - b1), by step and leaf."""
    firsts = [step.first for step in steps]
    return [
        {x: (step.first[x] - beta1 * earlier(firsts, t, x)) / (1.0 - beta1) for x in step.names}
        for t, step in enumerate(steps)
    ]


def _equations(
    steps: Sequence[Step], taken: list[Leaves], decays: bool = False, carries: bool = False
) -> list[Equations]:
    made = []
    for (t, step), name in itertools.product(enumerate(steps), steps[0].names):
        terms = step.gradient[name], *([earlier(taken, t, name)] if carries else ())
        own = (step.before[name],) if decays else ()
        made.append(Equations(t, taken[t][name], (), terms, own, _noise(taken[t])))
    return made


def _noise(gradient: Leaves) -> float:
    """Return the rounding of one leaf: a share of the whole's, for null leaves are only that."""
    return GRADIENT_ROUNDING * norm([norm(g) for g in gradient.values()]) / len(gradient) ** 0.5


def _decay(
    steps: Sequence[Step], taken: list[Leaves], factors: Sequence[Number]
) -> dict[str, Number] | None:
    """Return how many times its weights each leaf has in its gradient; None if not constant."""
    decay: dict[str, Number | None] = {}
    for name in steps[0].names:
        by_step = []
        for step, gradient, factor in zip(steps, taken, factors, strict=True):
            left = gradient[name] - factor.value * step.gradient[name]
            noise = _noise(gradient) + factor.error * norm(step.gradient[name])
            by_step.append(fit.share_along(left, step.before[name], noise))
        decay[name] = fit.constant_of(by_step, np.ones(len(steps)))
    return fit.all_known(decay)


def _clipping(factors: Sequence[Number], norms: Sequence[float]) -> Gradient:
    """Infer the rule that scales a gradient of norm n by min(1, N / (n + e)), or by a constant."""
    # 1 / factor = n / N + e / N is linear in n. Pascanu et al., "On the difficulty of training
    # recurrent neural networks", 2013.
    if not any(factor.differs(factors[0]) for factor in factors):
        factor = factors[0] if factors[0].differs(_ONE) else _ONE
        return Gradient(Number(np.inf), Number(0.0), factor)
    clipped = [(_ONE / f, n) for f, n in zip(factors, norms, strict=True) if f.differs(_ONE)]
    if len(clipped) < 3:  # two unknowns, and one equation more that they must explain
        return Gradient()
    target, sizes = np.array([(inverse.value, n) for inverse, n in clipped]).T
    noise = norm([inverse.error for inverse, _ in clipped])
    found = solve([Equations(0, target, (sizes, np.ones_like(target)), noise=noise)])
    if found is None:
        return Gradient()
    slope, offset = found.shared
    return Gradient(_ONE / slope, offset / slope, _ONE)
