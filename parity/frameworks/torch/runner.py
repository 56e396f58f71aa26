"""A PyTorch model with weights, a dtype and a device, which answers the levels in NumPy."""

import copy
from collections.abc import Callable
from typing import Self, TypeVar

import torch

from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.default_call import NoLoss
from parity.frameworks.leaves import Arrays, CastLater, Leaves
from parity.frameworks.protocols import Decoder, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.calls import outputs_of, tensors
from parity.frameworks.torch.capture import backward_torch, capture_torch
from parity.frameworks.torch.leaves import load_torch, to_numpy, torch_leaves
from parity.frameworks.torch.purity import torch_purity

TorchSpec = ModelSpec[torch.nn.Module, torch.Tensor]
Result = TypeVar("Result")


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

    def outputs(self, batch: Batch) -> Outputs:
        """Return the model's output, leaf by leaf."""
        with torch.no_grad():
            return outputs_of(self._called(self._spec.forward, batch))

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss and its gradient by leaf."""
        loss, gradients = self._loss_and_gradients(batch)
        return float(loss), {name: to_numpy(x) for name, x in gradients.items()}

    def forward_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward pass that are not in float64."""
        _ = self.module  # loaded first, for loading is no part of the question
        return torch_purity(self._called, self._spec.forward, batch)

    def gradient_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward and backward pass that are not in float64."""
        _ = self.module  # loaded first, for loading is no part of the question
        try:
            return torch_purity(self._loss_and_gradients, batch)
        except NoLoss:
            return self.forward_purity(batch)

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Pass inputs and output of every module in a forward pass to `on_trace`."""
        capture_torch(self.module, lambda: self._called(self._spec.forward, batch), on_trace)

    def backward(self, batch: Batch) -> list[Backward]:
        """Return the gradients of the loss at every module's calls, last call first."""
        return backward_torch(self.module, lambda: self._called(self._spec.loss, batch))

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

    def arguments(self, batch: Batch) -> tuple[tuple, dict[str, object]]:
        """Return the inputs and keywords of a call, in the runner's dtype and on its device."""
        both = batch.inputs, dict(batch.keywords)
        return tensors(both, self._dtype, self._device)

    def _called(self, function: Callable[..., Result], batch: Batch) -> Result:
        inputs, keywords = self.arguments(batch)
        return function(self.module, *inputs, **keywords)

    def _load(self) -> torch.nn.Module:
        module = self._spec.build(self._dtype)
        load_torch(module, CastLater(self._leaves, self._dtype))
        return module.to(self._device).eval()

    def _loss_and_gradients(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and its gradient by every parameter that is not frozen."""
        loss = self._called(self._spec.loss, batch)
        named = {name: x for name, x in self.module.named_parameters() if x.requires_grad}
        if not loss.requires_grad:
            return loss.detach(), {name: torch.zeros_like(x) for name, x in named.items()}
        parameters = list(named.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), dict(zip(named, found, strict=True))
