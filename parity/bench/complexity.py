"""How cost grows with the context: fitted exponents, and what a compiled program costs by itself.

The argument that the numbers are held against: one cached token reads the weights and the cache,
so its cost is affine in the context and its exponent lies between 0 and 1; one uncached token reads
the whole sequence again, so the products grow with the context, and the scores with its square.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import flax_gpt

MIN_CONTEXTS = 3
ARGUMENTS = {
    "cached": "a token reads the weights once and the cache once, so its cost is affine in the "
    "context, between the powers 0 and 1",
    "uncached": "a token computes the whole sequence again: its products grow with the context "
    "and its scores with the square, so one token lies between the powers 1 and 2, and a text is "
    "one power above",
}

# Quantiles of Student's t that leave 2.5 % above, by degrees of freedom from 1.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Exponent:
    """A power law that was fitted to costs.

    Attributes:
        value: the power of the context.
        low: lower end of the interval that holds it in 95 of 100 repetitions.
        high: upper end.
        factor: the cost at context 1.
        num_points: costs that were fitted.
    """

    value: float
    low: float
    high: float
    factor: float
    num_points: int

    def cost(self, context: float) -> float:
        """The cost that the law gives to a context."""
        return self.factor * context**self.value

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}..{self.high:.2f})"


def fit_exponent(points: Sequence[tuple[float, float]]) -> Exponent | None:
    """Least squares of the logarithms of costs against those of contexts.

    The interval is Student's t with as many degrees of freedom as there are points beyond two, so
    it also widens where the cost is no power of the context at all.

    Args:
        points: pairs of a context and a cost, both above 0; a context may come more than once.

    Returns:
        None for fewer than three different contexts, which would always lie on a line.
    """
    if len({context for context, _ in points}) < MIN_CONTEXTS:
        return None
    x = [math.log(context) for context, _ in points]
    y = [math.log(cost) for _, cost in points]
    slope, intercept = statistics.linear_regression(x, y)
    freedom = len(points) - 2
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    mean = statistics.fmean(x)
    error = math.sqrt(residual / freedom / sum((a - mean) ** 2 for a in x))
    reach = (_STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96) * error
    return Exponent(slope, slope - reach, slope + reach, math.exp(intercept), len(points))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """How one cost of a token grows with the context.

    Attributes:
        framework: whose cost.
        form: cached or uncached.
        quantity: time, FLOP, bytes or memory.
        source: how the costs were found.
        points: pairs of tokens held and the cost of one more, all rounds of all contexts.
    """

    framework: str
    form: str
    quantity: str
    source: str
    points: tuple[tuple[float, float], ...]

    @property
    def exponent(self) -> Exponent | None:
        """See `fit_exponent`; None with too few contexts."""
        return fit_exponent(self.points)

    def to_dict(self) -> dict[str, Any]:
        """The law as JSON has it."""
        found = self.exponent
        return {
            "framework": self.framework,
            "form": self.form,
            "quantity": self.quantity,
            "source": self.source,
            "points": [list(point) for point in self.points],
            "exponent": None if found is None else dataclasses.asdict(found),
        }


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one decoding step of all rows has to read, once each.

    Attributes:
        config: of the model.
        batch_size: rows.
        itemsize: bytes of a number.
    """

    config: flax_gpt.GPTConfig
    batch_size: int
    itemsize: int

    @property
    def weights(self) -> int:
        """The linear layers, the norms, the table as the head, and the rows that are looked up."""
        D, F = self.config.embed_dim, self.config.mlp_dim
        linear = 4 * (D * D + D) + (D * F + F) + (F * D + D)
        norms = 2 * self.config.num_layers + 1
        numbers = self.config.num_layers * linear + norms * 2 * D + self.config.vocab_size * D
        return (numbers + 2 * self.batch_size * D) * self.itemsize

    def layer_cache(self, slots: float) -> float:
        """Keys and values of so many slots per row in one layer: 2 B K S H and the itemsize."""
        config = self.config
        return 2 * self.batch_size * config.kv_heads * slots * config.head_width * self.itemsize

    def cache(self, slots: float) -> float:
        """The same in all layers."""
        return self.config.num_layers * self.layer_cache(slots)

    def per_step(self, slots: float) -> float:
        """Weights and the valid cache of all rows."""
        return self.weights + self.cache(slots)
