"""A PyTorch model with weights, a dtype and a device: it answers the levels in NumPy.

Read beside parity/flax_run.py; the two classes have the same methods.
"""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch

from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.leaves import CastLater, Leaves, cast_array
from parity.frameworks.protocols import Decoder, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.spec import Batch, ModelSpec
from parity.frameworks.torch.capture import backward_torch, capture_torch
from parity.frameworks.torch.leaves import from_numpy, load_torch, to_numpy
from parity.frameworks.torch.purity import torch_purity


class TorchRunner:
    """One model. Training and decoding start from fresh copies of it.

    It is loaded when it is needed, and again after it was released.
    """

    def __init__(
        self, side: ModelSpec, leaves: Mapping[str, np.ndarray], dtype: str, device: torch.device
    ):
        self.name = side.name
        # As they were given: a copy in another type would be one more model in memory.
        self._spec, self._leaves = side, leaves
        self._dtype, self._device = dtype, device
        self._module: torch.nn.Module | None = None

    def at(self, leaves: Mapping[str, np.ndarray]) -> "TorchRunner":
        """The same model with other weights."""
        other = copy.copy(self)
        other._leaves, other._module = leaves, None
        return other

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        if self._module is None:
            self._module = self._load()
        return self._module

    def release(self) -> None:
        """Gives the model's memory back until it is asked for again."""
        self._module = None

    def outputs(self, batch: Batch) -> np.ndarray:
        """The model's output."""
        with torch.no_grad():
            return to_numpy(self._spec.forward(self.module, *self.arrays(batch)))

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """The loss, and its gradient by leaf."""
        loss, gradients = self._loss_and_gradients(batch)
        names = dict(self.module.named_parameters())
        return float(loss), dict(zip(names, map(to_numpy, gradients), strict=True))

    def forward_purity(self, batch: Batch) -> Purity:
        """What the forward pass is made of."""
        return torch_purity(self._spec.forward, self.module, *self.arrays(batch))

    def gradient_purity(self, batch: Batch) -> Purity:
        """What the forward and backward pass are made of."""
        _ = self.module  # loaded before, for that is no part of the question
        return torch_purity(self._loss_and_gradients, batch)

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Tells inputs and outputs of every module in a forward pass."""
        arrays = self.arrays(batch)
        capture_torch(self.module, lambda: self._spec.forward(self.module, *arrays), on_trace)

    def backward(self, batch: Batch) -> list[Backward]:
        """The gradients of the loss that every module passes back, the last call first."""
        arrays = self.arrays(batch)
        return backward_torch(self.module, lambda: self._spec.loss(self.module, *arrays))

    def trainer(self, num_steps: int) -> Trainer:
        """The side's trainer for a training of `num_steps`, on weights of its own."""
        return self._spec.trainer(self._load(), num_steps)

    def decoder(self) -> Decoder:
        """The side's decoder."""
        return self._spec.decoder(self.module)

    def decoder_traces(self, call: Callable[[Decoder], object]) -> list[Trace]:
        """Inputs and outputs of every module while `call` uses the side's decoder."""
        traces: list[Trace] = []
        capture_torch(self.module, lambda: call(self.decoder()), traces.append)
        return traces

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

    def arrays(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The inputs of a call, in the run's type and on its device."""
        return tuple(
            _tensor(cast_array(array, self._dtype)).to(self._device) for array in batch.inputs
        )


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Integers become int64, the only type torch takes as an index everywhere."""
    tensor = from_numpy(array)
    return tensor.long() if tensor.dtype == torch.int32 else tensor
