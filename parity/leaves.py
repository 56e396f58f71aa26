"""The weights of a module as named NumPy arrays, of whichever framework."""

from collections.abc import Mapping

import numpy as np

Leaves = dict[str, np.ndarray]


def copied(leaves: Mapping[str, np.ndarray]) -> Leaves:
    """The same numbers in memory of their own."""
    return {name: np.array(array) for name, array in leaves.items()}


def cast(leaves: Mapping[str, np.ndarray], dtype: str) -> Leaves:
    """The same numbers with every float in the given dtype."""
    return {name: cast_array(array, dtype) for name, array in leaves.items()}


def cast_array(array: np.ndarray, dtype: str) -> np.ndarray:
    """The same numbers in the given dtype, if they are floats."""
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def neighbours(leaves: Mapping[str, np.ndarray], seed: int) -> Leaves:
    """Every float moved to the next one above or below it, by chance."""
    rng = np.random.default_rng(seed)
    return {
        name: np.nextafter(leaf, rng.choice([-np.inf, np.inf], leaf.shape).astype(leaf.dtype))
        if np.issubdtype(leaf.dtype, np.floating)
        else leaf
        for name, leaf in leaves.items()
    }


def dotted(path: tuple) -> str:
    """A path in a Flax module as a name, spelt as torch spells names."""
    return ".".join(map(str, path))


def different_leaves(present: Leaves, given: Mapping[str, np.ndarray]) -> list[str]:
    """What keeps `given` from standing in for `present`: names, shapes and dtypes, in words."""
    problems = [f"{name} is missing" for name in present if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in present]
    problems += [
        f"{name} is {given[name].dtype}{list(given[name].shape)}, "
        f"not {array.dtype}{list(array.shape)}"
        for name, array in present.items()
        if name in given and (given[name].shape != array.shape or given[name].dtype != array.dtype)
    ]
    return problems


def require_same(side: str, present: Leaves, given: Mapping[str, np.ndarray]) -> None:
    """Refuses leaves that are not exactly the module's.

    Raises:
        ValueError: with every difference of names, shapes and dtypes.
    """
    if problems := different_leaves(present, given):
        raise ValueError(f"load_{side}: {'; '.join(problems)}. Give exactly the module's leaves.")
