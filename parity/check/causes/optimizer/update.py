"""How an optimizer makes an update of its moments."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from parity.check.bounds import WEIGHT_ROUNDING
from parity.check.causes import fit
from parity.check.causes.fit import Equations, Number, all_known, constant_of, norm
from parity.check.causes.optimizer.step import Step


@dataclasses.dataclass(frozen=True)
class Update:
    """The rule that makes an update of the moments."""

    epsilon: Number  # added to the root of the second moment, or below it
    inside: bool  # whether below the root
    corrected: bool  # whether it meets a second moment with its bias corrected
    rates: tuple[Number, ...]  # by step, of the direction with both biases corrected
    decay: Mapping[str, Number] | None  # of weights, apart from the gradient; None when unknown
    scaled: bool  # whether decay is times the rate


def read_update(steps: Sequence[Step], beta1: Number, beta2: Number) -> Update | None:
    """Return the first form of the update that explains every step: as published, then mistaken."""
    counts = range(1, len(steps) + 1)
    corrections = [[_correction(beta, count) for count in counts] for beta in (beta1, beta2)]
    for inside, corrected in itertools.product((False, True), (True, False)):
        if update := _read_form(steps, corrections, inside, corrected):
            return update
    return None


@dataclasses.dataclass(frozen=True)
class _Move:
    """One leaf in one step."""

    step: int
    name: str
    p: np.ndarray  # weights
    u: np.ndarray  # update
    m: np.ndarray  # first moment
    s: np.ndarray  # root of the second
    rounding: np.ndarray  # in u

    def equations(self, inside: bool) -> Equations:
        """Return the update as linear equations, by multiplying with its denominator.

        With the rate r, decay q and d = u + q p, which is all but decay: d s = -e d - r m with
        epsilon outside the root, and d^2 s^2 = -e d^2 + r^2 m^2 with it inside. The terms that have
        q in them are the leaf's own.
        """
        p, u, m, s = self.p, self.u, self.m, self.s
        if not inside:
            noise = norm(self.rounding * s)
            return Equations(self.step, u * s, (-u,), (-m,), (p * s, p), noise)
        noise, v = norm(2.0 * self.rounding * u * s * s), s * s
        own = u * p * v, p * p * v, u * p, p * p
        return Equations(self.step, u * u * v, (-u * u,), (m * m,), own, noise)

    def direction(self, epsilon: float, inside: bool) -> np.ndarray:
        """Return the first moment over the root of the second; 0 for 0 / 0."""
        below = np.sqrt(self.s * self.s + epsilon) if inside else self.s + epsilon
        return np.divide(self.m, below, out=np.zeros_like(self.m), where=below > 0.0)


def _read_form(
    steps: Sequence[Step], corrections: Sequence[Sequence[Number]], inside: bool, corrected: bool
) -> Update | None:
    moves = []
    for (t, step), name in itertools.product(enumerate(steps), steps[0].names):
        first, second = corrections[0][t].value, corrections[1][t].value if corrected else 1.0
        p, u = step.before[name], step.after[name] - step.before[name]
        m, s = step.first[name] / first, np.sqrt(step.second[name] / second)
        moves.append(_Move(t, name, p, u, m, s, WEIGHT_ROUNDING * (np.abs(p) + np.abs(u))))
    if (found := fit.solve([move.equations(inside) for move in moves])) is None:
        return None
    (epsilon,), rates = found.shared, [rate for (rate,) in found.by_step]
    if epsilon.value < 0.0 and not epsilon.is_zero:
        return None
    if inside:
        rates = [rate.root() for rate in rates]
    if (lost := _lost(moves, epsilon, rates, inside)) is None:
        return None
    if not corrected:
        rates = [rate / c.root() for rate, c in zip(rates, corrections[1], strict=True)]
    # The moments were corrected by betas that may be off.
    for correction in corrections:
        rates = [x * Number(1.0, c.error / c.value) for x, c in zip(rates, correction, strict=True)]
    decay, scaled = _decay(lost, rates, corrections)
    return Update(epsilon, inside, corrected, tuple(rates), decay, scaled)


def _lost(
    moves: Iterable[_Move], epsilon: Number, rates: Sequence[Number], inside: bool
) -> dict[str, list[Number]] | None:
    """Return the share of itself that each leaf lost in each step; None if it is not all."""
    lost: dict[str, list[Number]] = {}
    left, equations = [], []
    low, middle, high = (max(epsilon.value + x * epsilon.error, 0.0) for x in (-1.0, 0.0, 1.0))
    for move in moves:
        rate, direction = rates[move.step], move.direction(middle, inside)
        # Where the second moment is only rounding, epsilon decides, and it may be off.
        nudge = norm(move.direction(low, inside) - move.direction(high, inside))
        rest = move.u + rate.value * direction
        noise = norm(move.rounding) + rate.error * norm(direction) + abs(rate.value) * nudge
        share = fit.share_along(-rest, move.p, noise)
        lost.setdefault(move.name, []).append(share)
        left.append(norm((rest + share.value * move.p) * move.s))
        equations.append(Equations(move.step, move.u, noise=norm(move.rounding * move.s)))
    return None if fit.residual_noise(norm(left), equations) is None else lost


def _decay(
    lost: Mapping[str, Sequence[Number]],
    rates: Sequence[Number],
    corrections: Sequence[Sequence[Number]],
) -> tuple[dict[str, Number] | None, bool]:
    """Return decay by leaf, and whether it is times the rate.

    The inferred rates are those of a direction with both biases corrected. Where a correction is
    missing, the rates that weights decay with are others.
    """
    seen = np.array([rate.value for rate in rates])
    first = np.array([c.value for c in corrections[0]])
    second = np.array([c.value for c in corrections[1]]) ** 0.5
    constant = np.ones_like(seen)
    for schedule in (seen, seen / first, seen * second, seen * second / first, constant):
        decay = {name: constant_of(shares, schedule) for name, shares in lost.items()}
        if (known := all_known(decay)) is not None:
            return known, schedule is not constant
    return None, False


def _correction(beta: Number, count: int) -> Number:
    """Return the bias correction after `count` steps, 1 - beta^count."""
    return Number(1.0 - beta.value**count, count * abs(beta.value) ** (count - 1) * beta.error)
