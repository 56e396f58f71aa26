"""How the time of a token grows with the context: fitted exponents.

A cached token reads the weights and the cache, so its cost is affine in the context and its
exponent lies between 0 and 1. An uncached token reads the whole sequence again, so its products
grow with the context and its scores with the square.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

MIN_CONTEXTS = 3
EXPECTED = {
    "cached": "a token reads the weights once and the cache once, so its cost is affine in the "
    "context, between the powers 0 and 1",
    "uncached": "a token computes the whole sequence again: its products grow with the context "
    "and its scores with the square, so one token lies between the powers 1 and 2, and a text is "
    "one power above",
}


@dataclasses.dataclass(frozen=True)
class Exponent:
    """A power law fitted to costs.

    Attributes:
        value: the power of the context.
        low: lower end of its 95 % confidence interval.
        high: upper end.
        factor: the cost at context 1.
    """

    value: float
    low: float
    high: float
    factor: float

    def cost(self, context: float) -> float:
        """Return the fitted cost at a context."""
        return self.factor * context**self.value

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}..{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class ScalingFit:
    """How the time of a token grows with the context.

    Attributes:
        name: of the decoder.
        form: cached or uncached.
        points: pairs of tokens held and the seconds of one more, all rounds of all contexts.
        exponent: fitted to them; None with too few contexts.
    """

    name: str
    form: str
    points: tuple[tuple[float, float], ...]
    exponent: Exponent | None


def fit_exponent(points: Sequence[tuple[float, float]]) -> Exponent | None:
    """Fit a line to the logarithms of costs and contexts by least squares.

    The interval is Student's t with two degrees of freedom fewer than points, so it also widens
    where the cost is no power of the context.

    Args:
        points: pairs of a context and a cost, both above 0; a context may come more than once.

    Returns:
        None for fewer than three different contexts, which would always lie on a line.
    """
    if len({context for context, _ in points}) < MIN_CONTEXTS:
        return None
    x, y = np.log(np.array(points, np.float64)).T
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    reach = stdtrit(len(points) - 2, 0.975) * np.sqrt(covariance[0, 0])
    return Exponent(*map(float, (slope, slope - reach, slope + reach, np.exp(intercept))))
