"""What one optimizer step was seen to do."""

import dataclasses

import numpy as np

from parity.check.causes.fit import EPSILON
from parity.frameworks.leaves import Leaves

# Rounding of a gradient that is computed twice, of its norm: 1.6e-14 was measured at 124M weights.
GRADIENT = 1e-13
# Rounding of a second moment, of its norm, as first moments explain it: within four steps a square
# of theirs is up to 16 times as large. 6e-15 was measured.
MOMENT = 32 * EPSILON
# Rounding of a weight within a step.
WEIGHT = 4 * EPSILON
# Elements of a leaf that are kept, spread evenly: a few constants need no more.
_SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step, by leaf, in float64.

    Attributes:
        before: weights.
        after: weights.
        first: first moments after it.
        second: second moments after it.
        gradient: of the loss by the weights before it.
        norm: of the whole gradient.
    """

    before: Leaves
    after: Leaves
    first: Leaves
    second: Leaves
    gradient: Leaves
    norm: float

    @classmethod
    def sampled(
        cls, before: Leaves, after: Leaves, first: Leaves, second: Leaves, gradient: Leaves
    ) -> "Step":
        """A step of which only so many elements are kept as it takes to read it."""
        norm = float(np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values())))
        return cls(*map(sample, (before, after, first, second, gradient)), norm)

    @property
    def names(self) -> list[str]:
        """Leaves that have moments, and elements."""
        return [name for name, leaf in self.first.items() if leaf.size]

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        groups = self.before, self.after, self.first, self.second, self.gradient
        return all(np.all(np.isfinite(x)) for leaves in groups for x in leaves.values())


def sample(leaves: Leaves) -> Leaves:
    """Flat leaves of which only some elements are kept, copied so that the others can go."""
    return {x: leaf.ravel()[:: -(-leaf.size // _SAMPLE) or 1].copy() for x, leaf in leaves.items()}


def earlier(leaves: list[Leaves], t: int, name: str) -> np.ndarray:
    """A leaf one step earlier; zeros before the first."""
    return leaves[t - 1][name] if t else np.zeros_like(leaves[0][name])
