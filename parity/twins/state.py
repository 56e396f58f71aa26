"""Leaves and the state of a training as named NumPy arrays, of either twin.

A saved state has `parameters.`, `first.` and `second.` followed by a leaf name, `updates`, `step`,
and where there are such: `key`, `scale`, `streak`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, SupportsFloat, SupportsInt

import numpy as np

from parity.frameworks.leaves import Leaves, copied, different_leaves, require_same


class _Loss(Protocol):
    """Either package's `TokenLoss`."""

    mean: SupportsFloat
    perplexity: SupportsFloat
    num_tokens: SupportsInt


class _Evaluation(Protocol):
    """Either package's `Evaluation`."""

    loss: _Loss
    accuracy: SupportsFloat


def fitting(
    side: str, expected: Mapping[str, np.ndarray], given: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the leaves that fit, one after the other.

    Args:
        side: the framework, for the message.
        expected: arrays of the right shapes and dtypes.
        given: leaves by name; few of them need to be in memory at once.

    Yields:
        Names and leaves.

    Raises:
        ValueError: at the end, unless exactly the expected leaves were given.
    """
    seen: Leaves = {}
    for name, leaf in given:
        seen[name] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        if name in expected and not different_leaves({name: expected[name]}, {name: leaf}):
            yield name, leaf
    require_same(side, dict(expected), seen)


def named_state(
    parameters: Leaves, first: Leaves, second: Leaves, updates: int, step: int
) -> Leaves:
    """Return the arrays of a saved state that every training has."""
    groups = {"parameters.": parameters, "first.": copied(first), "second.": copied(second)}
    named = {prefix + name: x for prefix, leaves in groups.items() for name, x in leaves.items()}
    return named | {"updates": np.array(updates, np.int64), "step": np.array(step, np.int64)}


def leaves_under(prefix: str, saved: Leaves) -> Leaves:
    """Return the arrays whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}


def evaluation_numbers(evaluation: _Evaluation) -> dict[str, float]:
    """Return the numbers of either package's `Evaluation`."""
    return {
        "loss": float(evaluation.loss.mean),
        "perplexity": float(evaluation.loss.perplexity),
        "accuracy": float(evaluation.accuracy),
        "tokens": int(evaluation.loss.num_tokens),
    }


def require_same_state(present: Leaves, given: Leaves) -> None:
    """Refuse a state that is not exactly the trainer's.

    Raises:
        ValueError: with the first differences.
    """
    if problems := different_leaves(present, given):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{'; '.join(problems[:3])}{more}. A state is exactly the trainer's. Go on with the "
            "configuration that it was written with."
        )
