"""Null directions: parameters whose gradient is analytically zero.

What is computed for them is rounding, so relative tests would compare noise with noise.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence, Set

import numpy as np

from parity.check.metrics import along_ones, gradient_norm
from parity.frameworks.leaves import Leaves


@dataclasses.dataclass(frozen=True)
class NullDirections:
    """Where the gradient in float64 is zero up to rounding in both frameworks.

    Attributes:
        leaves: whole leaves. A key bias shifts all scores of a query alike, and softmax does not
            see it.
        means: leaves, and one axis each over which the mean of the gradient is zero. What is added
            to all channels of the residual stream alike is removed by the norms that read it; what
            is added to the scores of all classes alike, by the softmax of the loss.
        trained: all leaves that have a gradient.
        gradient_norm: of the whole gradient.
    """

    leaves: tuple[str, ...]
    means: tuple[tuple[str, int], ...]
    trained: Set[str]
    gradient_norm: float

    @classmethod
    def find(cls, flax: Leaves, torch: Leaves, zero: float) -> "NullDirections":
        """Find the null directions of two gradients.

        Args:
            flax: gradient by leaf.
            torch: the other framework's, by the same names and in the same layouts.
            zero: share of a norm up to which a part of it is rounding.
        """
        leaves = null_leaves((flax, torch), zero)
        means = tuple(
            (name, axis)
            for name in flax
            if name not in leaves
            for axis, size in enumerate(flax[name].shape)
            if size > 1
            and all(
                np.linalg.norm(along_ones(side[name], axis)) <= zero * np.linalg.norm(side[name])
                for side in (flax, torch)
            )
        )
        return cls(leaves, means, frozenset(flax), gradient_norm(flax))

    def __str__(self) -> str:
        """Name all directions; layers of one kind are named once."""
        groups: dict[str, list[str]] = {}
        for name in self.leaves:
            groups.setdefault("", []).append(name)
        for name, axis in self.means:
            groups.setdefault(f"the mean over axis {axis} of ", []).append(name)
        return "; ".join(words + ", ".join(kinds_of(names)) for words, names in groups.items())


def null_leaves(gradients: Sequence[Leaves], zero: float) -> tuple[str, ...]:
    """Return the leaves that are at most `zero` of the norm of each whole gradient."""
    limits = [zero * gradient_norm(gradient) for gradient in gradients]
    return tuple(
        name
        for name in gradients[0]
        if all(
            np.linalg.norm(gradient[name]) <= limit
            for gradient, limit in zip(gradients, limits, strict=True)
        )
    )


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return names of leaves with layer numbers as `*`, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
