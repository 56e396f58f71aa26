"""Find the operations of a PyTorch program that are narrower than float64."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parity.frameworks.purity import Purity


def torch_purity(function: Callable[..., object], *args: object) -> Purity:
    """Return the purity of all that function(*args) dispatches, backward passes included.

    What leaves torch, for NumPy say, is not seen.
    """
    with _Watch() as watch:
        function(*args)
    return Purity(watch.num_operations, dict(watch.impure))


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_operations = 0
        self.impure: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.num_operations += 1
        values = torch.utils._pytree.tree_leaves((args, kwargs, outputs))
        if any(_is_narrow(value) for value in values):
            self.impure[str(func)] += 1
        return outputs


def _is_narrow(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and torch.finfo(value.dtype).bits < 64
    )
