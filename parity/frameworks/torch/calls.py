"""What goes into a call of a PyTorch module, and what comes out of it."""

from collections.abc import Sequence

import numpy as np
import torch

from parity.frameworks.batch import Outputs, output_leaves, plain_array
from parity.frameworks.capture import ValueT, map_leaves
from parity.frameworks.leaves import cast_array
from parity.frameworks.protocols import NotCompared
from parity.frameworks.torch.leaves import from_numpy, to_numpy


def tensors(arguments: ValueT, dtype: str, device: torch.device) -> ValueT:
    """Return arguments with their arrays as tensors on a device, floats in the given dtype.

    Integers of 32 bits become int64, the only type torch takes as an index everywhere.
    """

    def tensor(value: object) -> object:
        if not isinstance(value, np.ndarray):
            return value
        found = from_numpy(cast_array(value, dtype)).to(device)
        return found.long() if found.dtype == torch.int32 else found

    return map_leaves(arguments, tensor)


def outputs_of(output: object) -> Outputs:
    """Return the leaves of an output as arrays by path."""
    return {path: _array(leaf) for path, leaf in output_leaves(output)}


def float_leaves(output: object, paths: Sequence[str] | None = None) -> list[torch.Tensor]:
    """Return the tensors of floats or complex numbers in an output.

    Args:
        output: of a call.
        paths: of those wanted, in order; all, in the order of their paths, when None.

    Raises:
        NotCompared: where there is none.
    """
    leaves = dict(output_leaves(output))
    wanted = (leaves.get(path) for path in (sorted(leaves) if paths is None else paths))
    tensors = [leaf for leaf in wanted if isinstance(leaf, torch.Tensor)]
    found = [leaf for leaf in tensors if leaf.is_floating_point() or leaf.is_complex()]
    if not found:
        raise NotCompared("the output has no floats, so it has no gradient")
    return found


def _array(leaf: object) -> np.ndarray:
    if not isinstance(leaf, torch.Tensor):
        return plain_array(leaf)
    dense = leaf if leaf.layout is torch.strided else leaf.to_dense()
    return plain_array(to_numpy(dense))
