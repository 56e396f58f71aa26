"""The weights of a PyTorch module as named NumPy arrays: read, load and cast."""

import copy

import ml_dtypes
import numpy as np
import torch

from parity.frameworks.leaves import Arrays, Leaves, require_same


def torch_leaves(module: torch.nn.Module) -> Leaves:
    """Return every parameter and persistent buffer of a module by its name."""
    return {name: to_numpy(tensor) for name, tensor in _tensors(module).items()}


def load_torch(module: torch.nn.Module, leaves: Arrays) -> None:
    """Overwrite all parameters and persistent buffers; names, shapes and dtypes must be equal.

    Integers of another width are loaded as the module's own.
    """
    tensors = _tensors(module)
    # Only shapes and types, for a copy would be one more model in memory.
    blank = {x: np.broadcast_to(to_numpy(v.new_empty(())), v.shape) for x, v in tensors.items()}
    require_same("torch", blank, leaves)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(from_numpy(leaves[name]))


def cast_torch(module: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """Copy a module into a float type, on the host; what is complex stays so."""
    real = getattr(torch, dtype)
    imaginary = torch.complex128 if real is torch.float64 else torch.complex64

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            return tensor.to("cpu", imaginary)
        return tensor.to("cpu", real if tensor.is_floating_point() else tensor.dtype)

    # What a hook computes anew before every call, as the old weight norm does, has no copy.
    computed = {
        id(x): x.detach().clone()
        for part in module.modules()
        for x in vars(part).values()
        if isinstance(x, torch.Tensor) and not x.is_leaf
    }
    return copy.deepcopy(module, computed)._apply(changed)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a module without what is no tensor, the extra state of a module say."""
    found = module.state_dict().items()
    return {name: tensor for name, tensor in found if isinstance(tensor, torch.Tensor)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor into an array of the same bits; `Tensor.numpy` refuses bfloat16."""
    return numpy_view(tensor.cpu().contiguous()).copy()


def numpy_view(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a tensor on the host as an array of the same bits."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Copy an array into a tensor of the same bits, on the host."""
    array = np.array(array, order="C")  # np.ascontiguousarray would give a scalar an axis
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
