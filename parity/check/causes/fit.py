"""Least squares with error bounds, for data whose only error is rounding.

A model either explains its data down to rounding or it is not the model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from parity.check.bounds import EPSILON, FIT_APART, FIT_RESIDUAL

Known = TypeVar("Known")


@dataclasses.dataclass(frozen=True)
class Number:
    """A fitted number and its largest error."""

    value: float
    error: float = 0.0

    @property
    def is_zero(self) -> bool:
        """Whether it cannot be told from 0."""
        return not self.differs(Number(0.0))

    def differs(self, other: "Number") -> bool:
        """Whether rounding alone cannot explain the difference of two numbers."""
        return abs(self.value - other.value) > FIT_APART * (self.error + other.error)

    def __mul__(self, other: "Number") -> "Number":
        error = abs(self.value) * other.error + abs(other.value) * self.error
        return Number(self.value * other.value, error)

    def __truediv__(self, other: "Number") -> "Number":
        if not other.value:
            return Number(np.nan, np.inf)
        value = self.value / other.value
        return Number(value, (self.error + abs(value) * other.error) / abs(other.value))

    def root(self) -> "Number":
        """Return the square root; that of 0 for a number that rounding has made negative."""
        root = max(self.value, 0.0) ** 0.5
        return Number(root, self.error / (2.0 * root) if root else self.error**0.5)


@dataclasses.dataclass(frozen=True)
class Equations:
    """One leaf in one step: target = a sum of terms, each an unknown times an array (N,)."""

    step: int  # from 0
    target: np.ndarray
    shared: tuple[np.ndarray, ...] = ()  # terms whose unknowns all steps and leaves share
    by_step: tuple[np.ndarray, ...] = ()  # those whose unknowns all leaves of a step share
    own: tuple[np.ndarray, ...] = ()  # those whose unknowns are this leaf's in this step
    noise: float = 0.0  # Euclidean norm of the rounding in target


class Solution(NamedTuple):
    """The unknowns of a model that explains its targets, in the order of the terms."""

    shared: tuple[Number, ...]
    by_step: tuple[tuple[Number, ...], ...]


def solve(equations: Sequence[Equations]) -> Solution | None:
    """Solve for unknowns on which all leaves and steps agree; None if more than rounding is left.

    The error of an unknown is what noise of the norm at hand can do to it at most. Frisch and
    Waugh, "Partial time regressions as compared with individual trends", 1933; Golub, "Numerical
    methods for solving linear least squares problems", 1965.

    Returns:
        None when the equations do not determine the unknowns either.
    """
    num_steps = 1 + max(e.step for e in equations)
    num_shared, num_by_step = len(equations[0].shared), len(equations[0].by_step)
    width = num_shared + num_by_step * num_steps
    blocks = []
    for e in equations:
        # A leaf's own terms are projected out of its equations, and what is left is compressed to
        # as many rows as it has unknowns, both by orthogonal steps: squares would lose digits.
        rows = np.linalg.qr(_without_own(e)).R
        start = num_shared + num_by_step * e.step
        columns = *range(num_shared), *range(start, start + num_by_step), width
        blocks.append(np.zeros((len(rows), width + 1)))
        blocks[-1][:, columns] = rows
    system = np.concatenate(blocks)
    matrix, target = system[:, :-1], system[:, -1]
    sizes = np.linalg.norm(matrix, axis=0)
    if len(system) < width or not np.any(sizes):
        return None
    sizes = np.where(sizes == 0.0, 1.0, sizes)
    left, singular, right = np.linalg.svd(matrix / sizes, full_matrices=False)
    # What the equations do not determine gets an error without bound, and is never sure.
    singular = np.maximum(singular, EPSILON * singular[0])
    inverse = right.T / singular
    found = inverse @ (left.T @ target) / sizes
    if (noise := residual_noise(norm(matrix @ found - target), equations)) is None:
        return None
    errors = np.linalg.norm(inverse, axis=1) / sizes * noise
    numbers = tuple(map(Number, found.tolist(), errors.tolist()))
    starts = range(num_shared, width, num_by_step or 1)
    by_step = tuple(numbers[start : start + num_by_step] for start in starts)
    return Solution(numbers[:num_shared], by_step)


def residual_noise(residual: float, equations: Sequence[Equations]) -> float | None:
    """Return max(residual, expected rounding noise); None if the residual exceeds rounding."""
    noise = norm([e.noise for e in equations])
    return max(residual, noise) if residual <= FIT_RESIDUAL * noise else None


def share_along(array: np.ndarray, weights: np.ndarray, noise: float) -> Number:
    """Return how many times the weights are in an array whose rounding has the norm `noise`."""
    size = norm(weights)
    return Number(float(array @ weights) / size**2, noise / size) if size else Number(0.0, np.inf)


def constant_of(numbers: Sequence[Number], factors: np.ndarray) -> Number | None:
    """Return the constant that times the factors is these numbers; None if there is none."""
    values, errors = np.array([(x.value, x.error) for x in numbers]).T
    size = float(factors @ factors)
    if not size or not np.all(np.isfinite(errors)):
        return Number(0.0, np.inf)
    value = float(values @ factors) / size
    if any(x.differs(Number(value * y)) for x, y in zip(numbers, factors, strict=True)):
        return None
    return Number(value, float(errors @ np.abs(factors)) / size)


def all_known(values: Mapping[str, Known | None]) -> dict[str, Known] | None:
    """Return the values, or None if one of them is unknown."""
    known = {name: value for name, value in values.items() if value is not None}
    return known if len(known) == len(values) else None


def norm(array: np.ndarray | Sequence[float]) -> float:
    """Return the Euclidean norm."""
    return float(np.linalg.norm(array))


def _without_own(e: Equations) -> np.ndarray:
    """Return all terms and the target as columns, orthogonal to the leaf's own terms."""
    columns = np.stack([*e.shared, *e.by_step, e.target], axis=1)
    if not e.own:
        return columns
    own = np.stack(e.own, axis=1)
    sizes = np.linalg.norm(own, axis=0)
    basis = np.linalg.qr(own / np.where(sizes == 0.0, 1.0, sizes)).Q
    return columns - basis @ (basis.T @ columns)
