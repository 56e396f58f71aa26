"""Leaves and the state of a training as named NumPy arrays, of either twin.

A saved state has `parameters.`, `first.` and `second.` followed by a leaf name, `updates`, `step`,
and where there are such: `key`, `scale`, `streak`.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from parity.frameworks.leaves import Leaves, copied, different_leaves, require_same


def fitting(
    framework: str, expected: Leaves, given: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the leaves that fit, one after the other.

    Args:
        framework: for the message.
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
    require_same(framework, expected, seen)


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
