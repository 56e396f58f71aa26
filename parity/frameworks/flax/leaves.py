"""The weights of a Flax NNX module as named NumPy arrays: read, load and cast."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from numpy.typing import DTypeLike

from parity.frameworks.leaves import Arrays, Leaves, cast_array, dotted, require_same

# How deep in a config types are looked for.
_DEEP = 3
# An epsilon that float32 does not see: that of nnx.WeightNorm, which torch's weight norm lacks.
_UNSEEN = 1e-12
# Casts of what modules hold beside their leaves, such as configs, by identity and dtype: all copies
# of a module share them, for a program is compiled again where they are not the same.
StaticCasts = dict[tuple[int, str], object]


Array = np.ndarray | np.generic | jax.Array
_SHORT: dict[np.dtype, np.dtype] = {
    np.dtype(np.int64): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.uint32),
}
_PYTHON_TYPES = {bool: np.bool_, int: np.int32, float: np.float32, complex: np.complex64}


class _Slot(NamedTuple):
    """Where a leaf lies: a path in the state, and which number of the value there."""

    path: tuple[object, ...]
    number: int
    array: Array


class Found(NamedTuple):
    """A leaf of a module.

    Attributes:
        owner: the innermost module that it lies in.
        name: of the leaf in it.
        variable: that holds it; None for an array that is an attribute itself.
        array: the leaf.
    """

    owner: nnx.Module
    name: str
    variable: nnx.Variable | None
    array: Array


def flax_leaves(module: nnx.Module) -> Leaves:
    """Return every array of a module by its path, without the states of random streams.

    Arrays lie in variables, alone or in a tree, or are attributes themselves.
    """
    return state_leaves(nnx.state(module))


def state_leaves(state: nnx.State) -> Leaves:
    """Return a state shaped like a module, such as gradients or moments, by the path of leaves."""
    return {name: np.array(slot.array) for name, slot in _slots(state).items()}


def load_flax(module: nnx.Module, leaves: Arrays) -> None:
    """Overwrite every array of a module; names and shapes must be equal, and so must dtypes.

    Integers of another width are loaded as the module's own.
    """
    slots = _slots(nnx.state(module))
    present = {name: np.asarray(slot.array) for name, slot in slots.items()}
    require_same("flax", present, leaves)
    # Without 64-bit types jax would round a float64 leaf to float32 on its way in.
    wide = any(leaf.dtype.itemsize >= 8 for leaf in leaves.values())

    def placed(name: str, array: object) -> jax.Array:
        # As it was placed: an array that is tied to its device would tie what is computed from it,
        # and a program is compiled again for each mixture of tied and free arguments.
        place = array.sharding if isinstance(array, jax.Array) and array.committed else None
        dtype = present[name].dtype
        if not isinstance(array, jax.Array):  # jax takes NumPy's integers in 32 bits
            dtype = _SHORT.get(dtype, dtype)
        return jax.device_put(leaves[name].astype(dtype, copy=False), place)

    with jax.enable_x64(wide or jnp.result_type(float) == jnp.float64):
        _assign(module, slots, {name: placed(name, slot.array) for name, slot in slots.items()})


def cast_flax(module: nnx.Module, dtype: str, casts: StaticCasts | None = None) -> nnx.Module:
    """Copy a module into a float type: its arrays, and the compute dtypes of layers and configs.

    In float64 it has no epsilon that float32 does not see, for there it would be a difference.

    Returns:
        The copy.
    """
    casts = {} if casts is None else casts
    copied = nnx.clone(module)
    for _, submodule in nnx.iter_modules(copied):
        if dtype == "float64" and isinstance(submodule, nnx.WeightNorm):
            submodule.epsilon = submodule.epsilon if submodule.epsilon > _UNSEEN else 0.0
        for name, held in list(vars(submodule).items()):
            if name.startswith("_pytree__") or isinstance(held, nnx.Variable | nnx.Module):
                continue
            changed = _cast_static(name, held, dtype, casts)
            if changed is not held:
                setattr(submodule, name, changed)
    slots = _slots(nnx.state(copied))
    arrays = {name: np.asarray(slot.array) for name, slot in slots.items()}
    new = {
        x: jnp.asarray(cast_array(a, dtype)) for x, a in arrays.items() if a.dtype.kind not in "iub"
    }
    _assign(copied, slots, new)
    return copied


def find_leaf(module: nnx.Module, name: str) -> Found:
    """Return what a leaf of a module is and where it lies.

    Raises:
        KeyError: for a name that `flax_leaves` does not have.
    """
    if (found := _find(module, name, Found(module, name, None, np.zeros(())))) is None:
        raise KeyError(name)
    return found


def _find(node: object, rest: str, found: Found) -> Found | None:
    """Follow `rest` from a node, in what was found on the way there. Keys may contain dots."""
    if isinstance(node, nnx.Variable):
        found, node = found._replace(variable=node), node.get_value()
    elif isinstance(node, nnx.Module):
        found = found._replace(owner=node, name=rest)
    if not rest:
        array = _numbers(node)
        return None if array is None else found._replace(array=array)
    for key, child in _children(node):
        text = dotted((key,))
        if rest == text or rest.startswith(f"{text}."):
            if (deeper := _find(child, rest[len(text) + 1 :], found)) is not None:
                return deeper
    return None


def _children(node: object) -> Iterable[tuple[object, object]]:
    if isinstance(node, nnx.List | tuple | list):
        return enumerate(node)
    if isinstance(node, Mapping) and not isinstance(node, nnx.Module):
        return node.items()
    return getattr(node, "__dict__", {}).items()


def _slots(state: nnx.State) -> dict[str, _Slot]:
    """Return where each leaf of a state lies, by its name."""
    slots: dict[str, _Slot] = {}
    for path, node in nnx.to_flat_state(state):
        if isinstance(node, nnx.RngState):
            continue
        value = node.get_value() if isinstance(node, nnx.Variable) else node
        for number, (inner, array) in enumerate(jax.tree_util.tree_flatten_with_path(value)[0]):
            words = [jax.tree_util.keystr(inner, simple=True, separator=".")] if inner else []
            name = dotted((*path, *words))
            if (array := _numbers(array)) is None:
                continue
            if name in slots:
                raise ValueError(
                    f"flax: two leaves are called {name}. A leaf is known by its path. Rename one."
                )
            slots[name] = _Slot(path, number, array)
    return slots


def _numbers(x: object) -> Array | None:
    """Return a leaf as an array; None for the key of a random stream, a text and the like."""
    if isinstance(x, bool | int | float | complex):
        return np.asarray(x, _PYTHON_TYPES[type(x)])
    if not isinstance(x, np.generic | np.ndarray | jax.Array):
        return None
    return None if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x


def _assign(module: nnx.Module, slots: Mapping[str, _Slot], arrays: Mapping[str, object]) -> None:
    """Put arrays into the slots of a module."""
    flat = nnx.to_flat_state(nnx.state(module))
    present: dict[tuple[object, ...], object] = {path: node for path, node in flat}
    by_path: dict[tuple[object, ...], dict[int, object]] = {}
    for name, array in arrays.items():
        by_path.setdefault(slots[name].path, {})[slots[name].number] = array
    for path, numbers in by_path.items():
        node = present[path]
        if not isinstance(node, nnx.Variable):
            _with(module, path, numbers[0])
            continue
        leaves, tree = jax.tree.flatten(node.get_value())
        leaves = [numbers.get(number, leaf) for number, leaf in enumerate(leaves)]
        node.set_value(jax.tree.unflatten(tree, leaves))


def _with(node: object, path: Sequence[object], value: object) -> object:
    """Put a value at a path below a node, in place or, where that cannot be, in a copy of it."""
    if not path:
        return value
    key, *rest = path
    is_sequence = isinstance(node, nnx.List | tuple | list)
    is_mapping = isinstance(node, Mapping) and not isinstance(node, nnx.Module)
    items = cast(MutableMapping[object, object], node)  # or a sequence, indexed alike
    child = items[key] if is_sequence or is_mapping else getattr(node, str(key))
    new = _with(child, rest, value)
    if new is child:
        return node
    if isinstance(node, tuple):
        replaced = [new if place == key else item for place, item in enumerate(node)]
        return getattr(node, "_make", type(node))(replaced)
    if dataclasses.is_dataclass(node) and not isinstance(node, nnx.Module | type):
        return dataclasses.replace(node, **{str(key): new})
    if is_sequence or is_mapping:
        items[key] = new
    else:
        setattr(node, str(key), new)
    return node


def _cast_static(name: str, held: object, dtype: str, casts: StaticCasts, depth: int = 0) -> object:
    """Return what a module holds with every float type that is called a dtype in another one."""
    if name.endswith("dtype"):
        return jnp.dtype(dtype) if _is_other_float(held, dtype) else held
    if (id(held), dtype) in casts:
        return casts[id(held), dtype]
    changed: dict = {}
    for key, value in _settings(held) if depth < _DEEP else ():
        new = _cast_static(key, value, dtype, casts, depth + 1)
        if new is not value:
            changed[key] = new
    if not changed:
        return held
    result: object
    if isinstance(held, linen.Module):
        result = held.clone(**changed)
    elif isinstance(held, dict):
        result = type(held)(held | changed)
    else:
        result = copy.copy(held)
        for key, value in changed.items():
            object.__setattr__(result, key, value)  # frozen or not
    casts[id(held), dtype] = result
    return result


def _settings(held: object) -> Iterator[tuple[str, object]]:
    """Yield what a config holds by name: a dict, a linen module or an object of plain values."""
    if isinstance(held, dict):
        yield from ((key, value) for key, value in held.items() if isinstance(key, str))
    elif isinstance(held, linen.Module):
        names = (x.name for x in dataclasses.fields(held) if x.name not in ("parent", "name"))
        yield from ((name, getattr(held, name)) for name in names)
    elif not isinstance(held, type | nnx.Pytree | jax.Array) and not callable(held):
        yield from getattr(held, "__dict__", {}).items()


def _is_other_float(held: object, dtype: str) -> bool:
    try:
        found = None if held is None else jnp.dtype(cast(DTypeLike, held))
    except TypeError:
        return False
    return found is not None and jnp.issubdtype(found, jnp.floating) and found != dtype
