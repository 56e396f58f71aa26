"""What goes into a call of a Flax NNX module, and what comes out of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.batch import Argument, Outputs, output_leaves, plain_array
from parity.frameworks.capture import map_leaves
from parity.frameworks.leaves import cast_array
from parity.frameworks.protocols import NotCompared


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of a call, of which programs are compiled for the arrays and all else is fixed."""

    inputs: tuple
    keywords: Mapping[str, object]

    def tree_flatten(self) -> tuple[list[object], object]:
        """Return the arrays, and what a program is compiled with."""
        leaves, tree = jax.tree.flatten((self.inputs, self.keywords))
        fixed = tuple((type(x), x) if isinstance(x, _FIXED) else None for x in leaves)
        return [x for x, kept in zip(leaves, fixed, strict=True) if kept is None], (tree, fixed)

    @classmethod
    def tree_unflatten(cls, aux: tuple, arrays: list[object]) -> "Arguments":
        """Put the arrays of `tree_flatten` back."""
        tree, fixed = aux
        rest = iter(arrays)
        leaves = [next(rest) if kept is None else kept[1] for kept in fixed]
        return cls(*jax.tree.unflatten(tree, leaves))


_FIXED = bool, int, float, complex, str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["paths", "derived", "others"],
)
@dataclasses.dataclass(frozen=True)
class Returned:
    """The leaves of an output, as a program can return them.

    Attributes:
        arrays: numbers among them.
        paths: of the arrays.
        derived: paths of those that jax made, which may have a gradient.
        others: path of each leaf that is no array, and the name of its type.
    """

    arrays: tuple[jax.Array, ...]
    paths: tuple[str, ...]
    derived: tuple[str, ...]
    others: tuple[tuple[str, str], ...]

    def outputs(self) -> Outputs:
        """Return the leaves as arrays by path."""
        arrays = zip(self.paths, map(_array, self.arrays), strict=True)
        return dict(arrays) | {path: np.array(kind) for path, kind in self.others}

    def float_leaves(self, paths: Sequence[str] | None = None) -> list[jax.Array]:
        """Return the arrays of floats or complex numbers that jax made.

        Args:
            paths: of those wanted, in order; all, in the order of their paths, when None.

        Raises:
            NotCompared: where there is none.
        """
        leaves = dict(zip(self.paths, self.arrays, strict=True))
        wanted = [x for x in (sorted(leaves) if paths is None else paths) if x in self.derived]
        found = [leaves[x] for x in wanted if jnp.issubdtype(leaves[x].dtype, jnp.inexact)]
        if not found:
            raise NotCompared("the output has no floats, so it has no gradient")
        return found


def _array(x: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
    """Return an array; of its shape alone, zeros."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return plain_array(np.broadcast_to(np.zeros((), x.dtype), x.shape))
    return plain_array(np.asarray(x))


def arguments(
    inputs: tuple[Argument, ...], keywords: Mapping[str, Argument], dtype: str
) -> Arguments:
    """Return the arguments of a call with their arrays on the device, floats in the given dtype."""

    def array(value: object) -> object:
        return jnp.asarray(cast_array(value, dtype)) if isinstance(value, np.ndarray) else value

    return Arguments(*map_leaves((inputs, keywords), array))


def returning_leaves(function: Callable[..., object]) -> Callable[..., Returned]:
    """Return a function whose output is taken apart, so that it can be compiled."""

    def returned(*args: object, **kwargs: object) -> Returned:
        arrays, derived, others = {}, [], []
        for path, leaf in output_leaves(function(*args, **kwargs)):
            leaf = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
            if isinstance(leaf, jax.Array):
                is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                found = "key" if is_key else leaf
            else:
                plain = plain_array(leaf)
                found = str(plain) if plain.dtype.kind == "U" else jnp.asarray(plain)
            if isinstance(found, str):
                others.append((path, found))
            else:
                arrays[path] = found
                derived += [path] * isinstance(leaf, jax.Array)
        return Returned(tuple(arrays.values()), tuple(arrays), tuple(derived), tuple(others))

    return returned
