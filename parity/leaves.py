"""The weights of a module as named NumPy arrays, read and written without changing a bit."""

from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np
import torch
from flax import nnx

Leaves = dict[str, np.ndarray]


def flax_leaves(module: nnx.Module) -> Leaves:
    """Every variable of a module by its path, without the states of random streams."""
    return {name: np.array(variable[...]) for name, variable in _variables(module).items()}


def load_flax(module: nnx.Module, leaves: Mapping[str, np.ndarray]) -> None:
    """Overwrites every variable of a module.

    Raises:
        ValueError: when names, shapes or dtypes are not exactly the module's.
    """
    variables = _variables(module)
    _require_same("flax", flax_leaves(module), leaves)
    # Without 64-bit types jax would round a float64 leaf to float32 on its way in.
    wide = any(leaf.dtype.itemsize == 8 for leaf in leaves.values())
    with jax.enable_x64(wide or jax.config.jax_enable_x64):
        for name, variable in variables.items():
            # As it was placed: an array that is tied to its device would tie what is computed from
            # it, and a program is compiled again for each mixture of tied and free arguments.
            array = variable[...]
            place = array.sharding if array.committed else None
            variable.set_value(jax.device_put(leaves[name], place))


def torch_leaves(module: torch.nn.Module) -> Leaves:
    """Every parameter and persistent buffer of a module by its name."""
    return {name: to_numpy(tensor) for name, tensor in module.state_dict().items()}


def load_torch(module: torch.nn.Module, leaves: Mapping[str, np.ndarray]) -> None:
    """Overwrites every parameter and persistent buffer of a module.

    Raises:
        ValueError: when names, shapes or dtypes are not exactly the module's.
    """
    tensors = module.state_dict()
    _require_same("torch", torch_leaves(module), leaves)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(from_numpy(leaves[name]))


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


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy as an array of the same bits; torch itself refuses bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def numpy_view(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory, on the host, as an array of the same bits."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same bits, on the host."""
    array = np.array(array, order="C")  # np.ascontiguousarray would give a number an axis
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def dotted(path: tuple) -> str:
    """A path in a Flax module as a name, spelt as torch spells names."""
    return ".".join(map(str, path))


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    flat = nnx.to_flat_state(nnx.state(module))
    return {
        dotted(path): variable for path, variable in flat if not isinstance(variable, nnx.RngState)
    }


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


def _require_same(side: str, present: Leaves, given: Mapping[str, np.ndarray]) -> None:
    if problems := different_leaves(present, given):
        raise ValueError(f"load_{side}: {'; '.join(problems)}. Give exactly the module's leaves.")
