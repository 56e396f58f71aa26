"""What recording and checking need of PyTorch. Read beside parity/golden/in_flax.py."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.leaves import torch_leaves
from parity.frameworks.torch.module import torch_spec
from parity.frameworks.torch.runner import TorchRunner

NAME = "torch"
MODULE = torch.nn.Module
side_of = torch_spec

# Buffers that are weights: what a batch norm has learned of its inputs.
_STATISTICS = "running_mean", "running_var", "num_batches_tracked"


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What a function builds, with torch's own generator at a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def leaves_of_side(side: ModelSpec, dtype: str) -> Leaves:
    """The weights that a side is built with."""
    return torch_leaves(side.build(dtype))


def leaves_of_run(run: TorchRunner) -> Leaves:
    """The weights that a run has."""
    return torch_leaves(run.module)


def fixed(module: torch.nn.Module) -> tuple[str, ...]:
    """Leaves that belong to the code and not to the weights, as masks and tables of angles."""
    return tuple(
        name
        for name, _ in module.named_buffers()
        if name.rpartition(".")[2] not in _STATISTICS
    )  # fmt: skip


def run_of(side: ModelSpec, weights: Mapping[str, np.ndarray]) -> TorchRunner:
    """The side in float64, on the CPU."""
    return TorchRunner(side, weights, "float64", torch.device("cpu"))


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"torch": torch.__version__}


def threads() -> int:
    """How many share the work."""
    return torch.get_num_threads()


def learning_rate(trainer: Any, optimizer: Callable | None) -> float:
    """The largest of the optimizer."""
    return trainer.learning_rate
