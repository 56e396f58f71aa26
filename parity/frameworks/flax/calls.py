"""What goes into a call of a Flax NNX module, and what comes out of it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.batch import Argument, Outputs, output_leaves, plain_array
from parity.frameworks.capture import map_leaves
from parity.frameworks.leaves import cast_array


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of a call, of which programs are compiled for the arrays and all else is fixed."""

    inputs: tuple
    keywords: dict[str, object]

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
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["paths", "others"]
)
@dataclasses.dataclass(frozen=True)
class Returned:
    """The leaves of an output, as a program can return them.

    Attributes:
        arrays: numbers among them.
        paths: of the arrays.
        others: path of each leaf that is no array, and the name of its type.
    """

    arrays: tuple[jax.Array, ...]
    paths: tuple[str, ...]
    others: tuple[tuple[str, str], ...]

    def outputs(self) -> Outputs:
        """Return the leaves as arrays by path."""
        arrays = zip(self.paths, (plain_array(np.asarray(x)) for x in self.arrays), strict=True)
        return dict(arrays) | {path: np.array(kind) for path, kind in self.others}

    def float_leaves(self) -> list[jax.Array]:
        """Return the arrays of floats or complex numbers, by the order of their paths."""
        by_path = sorted(zip(self.paths, self.arrays, strict=True), key=lambda x: x[0])
        return [x for _, x in by_path if jnp.issubdtype(x.dtype, jnp.inexact)]


def arguments(inputs: Argument, keywords: Argument, dtype: str) -> Arguments:
    """Return the arguments of a call with their arrays on the device, floats in the given dtype."""

    def array(value: object) -> object:
        return jnp.asarray(cast_array(value, dtype)) if isinstance(value, np.ndarray) else value

    return Arguments(*map_leaves((inputs, keywords), array))


def returning_leaves(function: Callable[..., object]) -> Callable[..., Returned]:
    """Return a function whose output is taken apart, so that it can be compiled."""

    def returned(*args: object, **kwargs: object) -> Returned:
        arrays, others = {}, []
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
        return Returned(tuple(arrays.values()), tuple(arrays), tuple(others))

    return returned
