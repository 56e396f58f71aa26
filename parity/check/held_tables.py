"""Tables of floats that both models were built with: no weights, so that they must be equal."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from flax import nnx

from parity.check import bounds
from parity.check.metrics import size_of
from parity.frameworks.flax.leaves import find_leaf, flax_leaves
from parity.frameworks.leaves import Arrays, Leaves
from parity.frameworks.rounding import MASK
from parity.frameworks.torch.constants import STATISTICS
from parity.frameworks.torch.leaves import torch_leaves
from parity.weights.weight_map import WeightMap

# Of two tables of random numbers nearly all numbers are distinct, and their cosine is small.
_DISTINCT, _COSINE = 0.98, 0.5


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that both models have.

    Attributes:
        flax: its leaves in flax; torch's numbers, if they agree to rounding.
        torch: its leaves in torch.
        exact: flax's leaves in float64 before rounding, where they are known and agree.
        gap: largest difference, of the largest number.
        bound: of the gap.
    """

    flax: Leaves
    torch: Leaves
    exact: Leaves
    gap: float
    bound: float


def find_tables(
    weight_map: WeightMap, module: torch.nn.Module, port: nnx.Module, exact: Arrays
) -> Iterator[Table]:
    """Yield the tables among the leaves of two models.

    They are buffers that are no statistics in torch, and neither parameters nor statistics in flax.
    What is only zeros or only ones in either model waits for its numbers, and what both have drawn
    at random is a state: these are weights.

    Args:
        weight_map: of the models.
        module: of torch, as built.
        port: of flax, as built.
        exact: constants of torch before rounding, where they are known.
    """
    ours, theirs = torch_leaves(module), flax_leaves(port)
    buffers = {x for x, _ in module.named_buffers() if x.rpartition(".")[2] not in STATISTICS}
    for link in weight_map.links:
        mine = {name: ours[name] for name in link.torch}
        other = {name: theirs[name] for name in link.flax}
        variables = [find_leaf(port, name).variable for name in other]
        if (
            not buffers.issuperset(mine)
            or any(isinstance(x, nnx.Param | nnx.BatchStat) for x in variables)
            or any(x.dtype.kind in "iub" for x in (*mine.values(), *other.values()))
        ):
            continue
        like = link.to_flax(mine, weight_map.flax_shapes)
        a, b = (np.concatenate([x[name].ravel() for name in other]) for x in (like, other))
        if _waits(a) or _waits(b) or _are_drawn(a, b):
            continue
        bound, true = bounds.TABLE, {}
        wide = {name: exact[name] for name in mine if name in exact}
        is_known = len(wide) == len(mine) and all(x.dtype.itemsize > 4 for x in wide.values())
        if is_known:
            true = link.to_flax(wide, weight_map.flax_shapes)
            rounding = _gap(a, np.concatenate([true[name].ravel() for name in other]))
            bound = max(bound, bounds.HELD_CONSTANTS * rounding)
        gap = _gap(a, b)
        agrees = gap <= bound
        yield Table(like if agrees else other, mine, true if agrees else {}, gap, bound)


def _waits(array: np.ndarray) -> bool:
    return not array.size or not array.any() or bool((array == 1).all())


def _are_drawn(a: np.ndarray, b: np.ndarray) -> bool:
    if any(np.unique(x).size < _DISTINCT * x.size for x in (a, b)) or a.size < 8:
        return False
    with np.errstate(all="ignore"):
        cosine = abs(np.vdot(a, b)) / (np.linalg.norm(a) * np.linalg.norm(b))
    return bool(cosine < _COSINE)


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference, of the largest number; masks and NaN must be the same."""
    counts = (abs(a) < MASK) & (abs(b) < MASK)
    if not np.array_equal(a[~counts].astype(b.dtype), b[~counts], equal_nan=True):
        return np.inf
    size = size_of(b[counts])
    return (
        size_of(a[counts].astype(np.result_type(a, np.float64)) - b[counts]) / size if size else 0.0
    )
