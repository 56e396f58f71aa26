"""The arguments of one call, and the arrays that it returns by their place in the output."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import TypeAlias

import numpy as np

from parity.frameworks.capture import leaves_of, map_leaves
from parity.frameworks.leaves import cast_array, neighbours

# An array of a call, a Python value that is fixed, or such in nested containers.
Argument: TypeAlias = (
    "np.ndarray | bool | int | float | str | Sequence[Argument] | Mapping[str, Argument] | None"
)
# The path of each leaf of an output to its array; "" for an output that is one array. A text is the
# numbers of its characters. An array of text stands for what cannot be compared, and is the name of
# its type.
Outputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of one call.

    Attributes:
        inputs: arguments by position.
        real: True where an element of the output counts, over the leading axes; None for all.
        keywords: arguments by name.
    """

    inputs: tuple[Argument, ...]
    real: np.ndarray | None = None
    keywords: Mapping[str, Argument] = dataclasses.field(default_factory=dict)

    def perturbed(self, dtype: str, seed: int, roundings: int) -> "Batch":
        """Return the call with floats of a dtype that are some roundings away."""

        def moved(value: object) -> object:
            if not isinstance(value, np.ndarray):
                return value
            array = cast_array(value, dtype)
            return np.where(np.isfinite(array), neighbours({"": array}, seed, roundings)[""], array)

        inputs, keywords = map_leaves((self.inputs, dict(self.keywords)), moved)
        return Batch(inputs, self.real, keywords)

    @property
    def num_rows(self) -> int:
        """The size of the first axis of all arrays; 0 where it is not one size."""
        leaves = leaves_of((self.inputs, dict(self.keywords)))
        sizes = {len(x) for x in leaves if isinstance(x, np.ndarray) and x.ndim}
        return sizes.pop() if len(sizes) == 1 else 0

    def resized(self) -> "Batch | None":
        """Return the call with another number of rows; None where there is no such number.

        Of three rows and more the last is left out; else there is one more.
        """
        size = self.num_rows
        if not size or self.real is not None:
            return None

        def moved(value: object) -> object:
            if not isinstance(value, np.ndarray) or not value.ndim:
                return value
            if size > 2:
                return value[:-1]
            row = value[:1] * value.dtype.type(0.75) if value.dtype.kind in "fc" else value[:1]
            return np.concatenate([value, row])

        inputs, keywords = map_leaves((self.inputs, dict(self.keywords)), moved)
        return Batch(inputs, None, keywords)

    def select(self, outputs: Outputs) -> Outputs:
        """Return what counts of each output; all of it if it lacks the axes of `real`."""
        real = self.real
        if real is None:
            return outputs
        return {
            path: array[real] if array.shape[: real.ndim] == real.shape else array
            for path, array in outputs.items()
        }


def output_leaves(output: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield path and value of each leaf of an output, in its own order; None is no leaf.

    Containers are mappings, data classes, named tuples, sequences, generators, and sets whose
    elements can be sorted.
    """
    for key, child in _children(output, path):
        if child is output:
            yield path, output
        else:
            yield from output_leaves(child, f"{path}.{key}" if path else key)


def _children(value: object, path: str) -> list[tuple[str, object]]:
    """Return the parts of a container by name; of a leaf, itself."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        spelled = str if len({str(key) for key in value}) == len(value) else repr
        return [(spelled(key), child) for key, child in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, Set):
        try:
            value = sorted(value)
        except Exception:  # arrays have no order
            return [(path, value)]
    if isinstance(value, Sequence | Iterator) and not isinstance(value, str | bytes):
        return [(str(place), child) for place, child in enumerate(value)]
    return [(path, value)]


def plain_array(leaf: object) -> np.ndarray:
    """Return a number, a text or a NumPy array of an output as it is compared; see `Outputs`."""
    if isinstance(leaf, str):
        return np.array([ord(x) for x in leaf], np.int32)
    array = np.asarray(
        leaf if isinstance(leaf, np.ndarray | np.generic | int | float | complex) else None
    )
    if array.dtype.kind == "V":  # bfloat16 and others of ml_dtypes
        array = array.astype(np.float32)
    return array if array.dtype.kind in "fiubc" else np.array(type(leaf).__name__)


def unequal(a: Outputs, b: Outputs) -> str | None:
    """Return the path of the first leaf in which two outputs differ; NaN is equal to itself."""
    for path, array in a.items():
        other = b.get(path, np.zeros(0, bool))
        if array.shape != other.shape or not np.array_equal(
            array, other, equal_nan=array.dtype.kind in "fc"
        ):
            return path
    return None


def all_nan(outputs: Outputs) -> bool:
    """Whether every float of an output, which has some, is NaN."""
    floats = [x for x in outputs.values() if x.dtype.kind in "fc" and x.size]
    return bool(floats) and all(np.all(np.isnan(x)) for x in floats)
