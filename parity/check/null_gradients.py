"""Null directions: parameters whose gradient is analytically zero.

What is computed for them is rounding, so relative tests would compare noise with noise.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence, Set

import numpy as np
from numpy.linalg import norm

from parity.check.metrics import along_ones, gradient_norm
from parity.frameworks.leaves import Leaves


@dataclasses.dataclass(frozen=True)
class NullDirections:
    """Where the gradient in float64 is zero up to rounding in both frameworks."""

    # Whole leaves. A key bias shifts all scores of a query alike, and softmax does not see it.
    leaves: tuple[str, ...]
    # Leaves, and one axis each over which the mean of the gradient is zero. What is added to all
    # channels of the residual stream alike is removed by the norms that read it; what is added to
    # the scores of all classes alike, by the softmax of the loss.
    means: tuple[tuple[str, int], ...]
    trained: Set[str]  # all leaves that have a gradient
    gradient_norm: float  # of the whole gradient

    @classmethod
    def find(cls, flax: Leaves, torch: Leaves, zero: float) -> "NullDirections":
        """Find the null directions of two gradients; up to `zero` of a norm is rounding."""
        leaves = null_leaves((flax, torch), zero)
        axes = (
            (x, i) for x in flax if x not in leaves for i, n in enumerate(flax[x].shape) if n > 1
        )

        def is_null(gradient: np.ndarray, axis: int) -> bool:
            return bool(norm(along_ones(gradient, axis)) <= zero * norm(gradient))

        means = tuple(x for x in axes if all(is_null(side[x[0]], x[1]) for side in (flax, torch)))
        return cls(leaves, means, frozenset(flax), gradient_norm(flax))

    def __str__(self) -> str:
        """Name all directions; layers of one kind are named once."""
        groups: dict[str, list[str]] = {"": list(self.leaves)} if self.leaves else {}
        for name, axis in self.means:
            groups.setdefault(f"the mean over axis {axis} of ", []).append(name)
        return "; ".join(words + ", ".join(kinds_of(names)) for words, names in groups.items())


def null_leaves(gradients: Sequence[Leaves], zero: float) -> tuple[str, ...]:
    """Return the leaves that are at most `zero` of the norm of each whole gradient."""
    sides = [(gradient, zero * gradient_norm(gradient)) for gradient in gradients]
    return tuple(x for x in gradients[0] if all(norm(g[x]) <= limit for g, limit in sides))


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return names of leaves with layer numbers as `*`, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
