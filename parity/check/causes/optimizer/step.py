"""Weights, moments and gradient of one optimizer step."""

import dataclasses

import numpy as np

from parity.check.metrics import gradient_norm
from parity.frameworks.leaves import Leaves

# Elements of a leaf that are kept, spread evenly: a few constants need no more.
_SAMPLE = 4096


@dataclasses.dataclass(frozen=True)
class Step:
    """Weights, moments after one optimizer step, and gradient before it; by leaf, in float64."""

    before: Leaves
    after: Leaves
    first: Leaves
    second: Leaves
    gradient: Leaves
    norm: float  # of the whole gradient

    @classmethod
    def sampled(
        cls, before: Leaves, after: Leaves, first: Leaves, second: Leaves, gradient: Leaves
    ) -> "Step":
        """Keep of a step only as many elements as it takes to infer it."""
        norm, moments = gradient_norm(gradient), (sample(first), sample(second))
        return cls(sample(before), sample(after), *moments, sample(gradient), norm)

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
    """Return flat leaves with only some of their elements, copied so that the others can go."""
    return {x: leaf.ravel()[:: -(-leaf.size // _SAMPLE) or 1].copy() for x, leaf in leaves.items()}


def earlier(leaves: list[Leaves], t: int, name: str) -> np.ndarray:
    """Return a leaf one step earlier; zeros before the first."""
    return leaves[t - 1][name] if t else np.zeros_like(leaves[0][name])
