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
    """Return the array in the given dtype if it holds floats, else as it is."""
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def neighbours(leaves: Arrays, seed: int, roundings: int = 1) -> Leaves:
    """Move every float by some units of its last place, up or down at random."""
    rng = np.random.default_rng(seed)

    def moved(leaf: np.ndarray) -> np.ndarray:
        sign = rng.choice([-1.0, 1.0], leaf.shape).astype(leaf.dtype)
        return leaf + sign * roundings * np.spacing(np.abs(leaf))

    floats = {name: np.issubdtype(leaf.dtype, np.floating) for name, leaf in leaves.items()}
    return {name: moved(leaf) if floats[name] else leaf for name, leaf in leaves.items()}


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
