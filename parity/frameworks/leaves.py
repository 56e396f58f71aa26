"""The weights of a module as named NumPy arrays, of whichever framework."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
Leaves = dict[str, np.ndarray]


def copied(leaves: Arrays) -> Leaves:
    """Copy every leaf."""
    return {name: np.array(array) for name, array in leaves.items()}


def cast(leaves: Arrays, dtype: str) -> Leaves:
    """Return the leaves with every float in the given dtype."""
    return {name: cast_array(array, dtype) for name, array in leaves.items()}


class CastLater(Mapping[str, np.ndarray]):
    """`cast` that converts a leaf when it is read, so that they need not all exist at once."""

    def __init__(self, leaves: Arrays, dtype: str):
        self._leaves, self._dtype = leaves, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        return cast_array(self._leaves[name], self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def cast_array(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return floats in the given dtype, complex numbers in the one that goes with it, else all."""
    if np.issubdtype(array.dtype, np.complexfloating):
        return array.astype("complex128" if dtype == "float64" else "complex64")
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def neighbours(leaves: Arrays, seed: int, roundings: int = 1) -> Leaves:
    """Move every float to the next one above or below, at random, or to one further away."""
    rng = np.random.default_rng(seed)
    moved = {}
    for name, leaf in leaves.items():
        if np.issubdtype(leaf.dtype, np.floating):
            towards = rng.choice([-np.inf, np.inf], leaf.shape).astype(leaf.dtype)
            for _ in range(roundings):
                leaf = np.nextafter(leaf, towards)
        moved[name] = leaf
    return moved


def dotted(path: Iterable[object]) -> str:
    """Spell a path in a Flax module as torch spells names."""
    return ".".join(map(str, path))


def different_leaves(present: Leaves, given: Arrays) -> list[str]:
    """List the names, shapes and dtypes in which `given` differs from `present`."""
    problems = [f"{name} is missing" for name in present if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in present]
    for name, array in present.items():
        if name in given:
            leaf = given[name]
            if leaf.shape != array.shape or leaf.dtype != array.dtype:
                found, expected = (f"{x.dtype}{list(x.shape)}" for x in (leaf, array))
                problems.append(f"{name} is {found}, not {expected}")
    return problems


def require_same(framework: str, present: Leaves, given: Arrays) -> None:
    """Refuse leaves that are not exactly the module's, with every difference."""
    if problems := different_leaves(present, given):
        raise ValueError(
            f"load_{framework}: {'; '.join(problems)}. Give exactly the module's leaves."
        )
