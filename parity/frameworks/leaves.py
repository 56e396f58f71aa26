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
    """Return the array in the given dtype if it holds floats, else as it is.

    A complex array stays complex, with parts of this dtype.
    """
    if array.dtype.kind in "iub":
        return array
    return array.astype(np.result_type(dtype, np.complex64) if array.dtype.kind == "c" else dtype)


def neighbours(leaves: Arrays, seed: int, roundings: int = 1) -> Leaves:
    """Move every float to the next one above or below, at random, or to one further away."""
    rng = np.random.default_rng(seed)

    def moved(leaf: np.ndarray) -> np.ndarray:
        if leaf.dtype.kind == "c":
            return moved(real_view(leaf)).view(leaf.dtype).reshape(leaf.shape)
        if not np.issubdtype(leaf.dtype, np.floating):
            return leaf
        towards = rng.choice([-np.inf, np.inf], leaf.shape).astype(leaf.dtype)
        for _ in range(roundings):
            leaf = np.nextafter(leaf, towards)
        return leaf

    return {name: moved(leaf) for name, leaf in leaves.items()}


def real_view(array: np.ndarray) -> np.ndarray:
    """Return a complex array as a vector of real and imaginary parts, others as they are."""
    if array.dtype.kind != "c":
        return array
    return np.ascontiguousarray(array).reshape(-1).view(array.real.dtype)


def dotted(path: Iterable[object]) -> str:
    """Spell a path in a Flax module as torch spells names; a key may be a tuple of keys."""
    return ".".join(dotted(key) if isinstance(key, tuple) else str(key) for key in path)


def different_leaves(present: Leaves, given: Arrays) -> list[str]:
    """List names, shapes and dtypes in which `given` differs; integers may have other widths."""
    problems = [f"{name} is missing" for name in present if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in present]
    for name, array in present.items():
        if name in given:
            leaf = given[name]
            if leaf.shape != array.shape or not _holds(array.dtype, leaf):
                found, expected = (f"{x.dtype}{list(x.shape)}" for x in (leaf, array))
                problems.append(f"{name} is {found}, not {expected}")
    return problems


def _holds(dtype: np.dtype, leaf: np.ndarray) -> bool:
    """Whether a dtype holds a leaf's numbers, all of which are integers where its own differs."""
    if leaf.dtype == dtype:
        return True
    are_integers = leaf.dtype.kind in "iub" and dtype.kind in "iub"
    return are_integers and np.array_equal(leaf.astype(dtype), leaf)


def require_same(framework: str, present: Leaves, given: Arrays) -> None:
    """Refuse leaves that are not exactly the module's, with every difference."""
    if problems := different_leaves(present, given):
        raise ValueError(
            f"load_{framework}: {'; '.join(problems)}. Give exactly the module's leaves."
        )
