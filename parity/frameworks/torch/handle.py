"""PyTorch, as `parity.frameworks.handle` hands it out."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch

from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.leaves import torch_leaves
from parity.frameworks.torch.module import TorchUse, torch_spec
from parity.frameworks.torch.module import largest_learning_rate as learning_rate
from parity.frameworks.torch.runner import TorchRunner

__all__ = ["MODULE", "NAME", "learning_rate"]

NAME, MODULE = "torch", torch.nn.Module

Built = TypeVar("Built")

# Buffers that are weights: what a batch norm has learned of its inputs.
_STATISTICS = "running_mean", "running_var", "num_batches_tracked"


def spec(module: torch.nn.Module, use: TorchUse) -> ModelSpec[torch.nn.Module, torch.Tensor]:
    """Return the spec of a module."""
    return torch_spec(module, use.call, use.loss, use.optimizer)


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Return what a function builds, with torch's own generator at a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def initial_leaves(spec: ModelSpec[torch.nn.Module, torch.Tensor], dtype: str) -> Leaves:
    """Return the weights that a model is built with."""
    return torch_leaves(spec.build(dtype))


def code_leaves(module: torch.nn.Module) -> tuple[str, ...]:
    """Name the buffers that are no statistics, such as masks and tables of angles."""
    names = (name for name, _ in module.named_buffers())
    return tuple(name for name in names if name.rpartition(".")[2] not in _STATISTICS)


def runner(
    spec: ModelSpec[torch.nn.Module, torch.Tensor], weights: Mapping[str, np.ndarray]
) -> TorchRunner:
    """Return a runner in float64 on the CPU."""
    return TorchRunner(spec, weights, "float64", torch.device("cpu"))
