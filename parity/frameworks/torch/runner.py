"""A PyTorch model with weights, a dtype and a device, which answers the levels in NumPy."""

import copy
from collections.abc import Callable
from typing import Self

import numpy as np
import torch

from parity.frameworks.batch import Batch
from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.leaves import Arrays, CastLater, Leaves, cast_array
from parity.frameworks.protocols import Decoder, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.capture import backward_torch, capture_torch
from parity.frameworks.torch.leaves import from_numpy, load_torch, to_numpy, torch_leaves
from parity.frameworks.torch.purity import torch_purity
from parity.frameworks.torch.uses import torch_uses
from parity.frameworks.uses import Uses

TorchSpec = ModelSpec[torch.nn.Module, torch.Tensor]


class TorchRunner:
    """A `LiveRunner` of a PyTorch model, loaded when it is needed, and again after `release`.

    Its leaves may have any float type; `dtype` is the one to compute in.
    """

    def __init__(self, spec: TorchSpec, leaves: Arrays, dtype: str, device: torch.device):
        self.name = spec.name
        # As they were given: a copy in another type would be one more model in memory.
        self._spec, self._leaves = spec, leaves
        self._dtype, self._device = dtype, device
        self._loaded: torch.nn.Module | None = None

    def at(self, leaves: Arrays) -> Self:
        """Return the same model with other weights."""
        other = copy.copy(self)
        other._leaves, other._loaded = leaves, None
        return other

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def leaves(self) -> Leaves:
        """Return the model's weights in its dtype."""
        return torch_leaves(self.module)

    def release(self) -> None:
        """Free the model's memory until it is asked for again."""
        self._loaded = None

    def outputs(self, batch: Batch) -> np.ndarray:
        """Return the model's output."""
        with torch.no_grad():
            return to_numpy(self._spec.forward(self.module, *self.arrays(batch)))

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss and its gradient by leaf."""
        loss, gradients = self._loss_and_gradients(batch)
        names = dict(self.module.named_parameters())
        return float(loss), dict(zip(names, map(to_numpy, gradients), strict=True))

    def forward_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward pass that are not in float64."""
        return torch_purity(self._spec.forward, self.module, *self.arrays(batch))

    def gradient_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward and backward pass that are not in float64."""
        _ = self.module  # loaded first, for loading is no part of the question
        return torch_purity(self._loss_and_gradients, batch)

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Pass inputs and output of every module in a forward pass to `on_trace`."""
        arrays = self.arrays(batch)
        capture_torch(self.module, lambda: self._spec.forward(self.module, *arrays), on_trace)

    def uses(self, batch: Batch) -> Uses:
        """Return how a forward pass uses each leaf."""
        arrays = self.arrays(batch)
        return torch_uses(self.module, lambda: self._spec.forward(self.module, *arrays))

    def backward(self, batch: Batch) -> list[Backward]:
        """Return the gradients of the loss at every module's calls, last call first."""
        arrays = self.arrays(batch)
        return backward_torch(self.module, lambda: self._spec.loss(self.module, *arrays))

    def trainer(self, num_steps: int) -> Trainer:
        """Return a trainer, with a copy of the model, for a schedule of `num_steps`."""
        assert self._spec.trainer is not None, f"{self.name} is not trained"
        return self._spec.trainer(self._load(), num_steps)

    def decoder(self) -> Decoder:
        """Return the model's decoder."""
        assert self._spec.decoder is not None, f"{self.name} has no cache"
        return self._spec.decoder(self.module)

    def decoder_traces(self, call: Callable[[Decoder], object]) -> list[Trace]:
        """Return inputs and output of every module while `call` uses the model's decoder."""
        traces: list[Trace] = []
        capture_torch(self.module, lambda: call(self.decoder()), traces.append)
        return traces

    def arrays(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return the inputs of a call, in the runner's dtype and on its device."""
        return tuple(
            _tensor(cast_array(array, self._dtype)).to(self._device) for array in batch.inputs
        )

    def _load(self) -> torch.nn.Module:
        module = self._spec.build(self._dtype)
        load_torch(module, CastLater(self._leaves, self._dtype))
        return module.to(self._device).eval()

    def _loss_and_gradients(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = self._spec.loss(self.module, *self.arrays(batch))
        parameters = list(self.module.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss.detach(), [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Convert an array; integers become int64, the only type torch takes as an index everywhere."""
    tensor = from_numpy(array)
    return tensor.long() if tensor.dtype == torch.int32 else tensor
