"""A PyTorch model with weights, a dtype and a device, which answers the levels in NumPy."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Self, TypeVar, cast

import torch

from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.leaves import Arrays, CastLater, Leaves
from parity.frameworks.protocols import Decoder, NotCompared, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.scoped import Scoped
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.calls import outputs_of, tensors
from parity.frameworks.torch.capture import backward_torch, capture_torch
from parity.frameworks.torch.constants import put_constants, tensors_of
from parity.frameworks.torch.leaves import load_torch, to_numpy, torch_leaves
from parity.frameworks.torch.lift import Held, lifted, line_of_error
from parity.frameworks.torch.purity import torch_purity
from parity.frameworks.torch.uses import torch_uses
from parity.frameworks.uses import Uses

TorchSpec = ModelSpec[torch.nn.Module, torch.Tensor]
Result = TypeVar("Result")


class TorchRunner:
    """A `LiveRunner` of a PyTorch model, loaded when it is needed, and again after `release`.

    Its leaves may have any float type; `dtype` is the one to compute in. With `lift`, float64 runs
    are lifted; where the model raises on that account, they are not, and its purity says so.

    Args:
        spec: of the model.
        leaves: its weights.
        dtype: to compute in.
        device: to compute on.
        lift: run in float64 what the model asks for in a narrower type, where dtype is float64.
        code_leaves: leaves that the model's code computes, which are kept as it does.
    """

    def __init__(
        self,
        spec: TorchSpec,
        leaves: Arrays,
        dtype: str,
        device: torch.device,
        *,
        lift: bool = False,
        code_leaves: Collection[str] = (),
    ):
        self.name = spec.name
        # As they were given: a copy in another type would be one more model in memory.
        self._spec, self._leaves = spec, leaves
        self._dtype, self._device = dtype, device
        self._lifts, self._code_leaves = lift and dtype == "float64", code_leaves
        self._raised_lifted: list[str] = []  # shared with copies at other weights
        self._moves = False
        self._loaded: torch.nn.Module | None = None
        self._held: Held | None = None
        self._again: dict[str, int] = {}  # constants that are in float64 now

    def at(self, leaves: Arrays) -> Self:
        """Return the same model with other weights."""
        other = copy.copy(self)
        other._leaves, other._loaded, other._held = leaves, None, None
        return other

    def moved(self) -> Self:
        """Return the same model with the constants that it holds in a narrow type moved.

        Each by half a unit in its last place: what rounding may have cost when it was made.
        """
        other = self.at(self._leaves)
        other._moves = True
        return other

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Compute as this runner does: lifted or not."""
        with lifted(self._constants) if self._is_lifted else contextlib.nullcontext():
            yield

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
        self._loaded = self._held = None

    def outputs(self, batch: Batch) -> Outputs:
        """Return the model's output, leaf by leaf."""

        def run() -> Outputs:
            with torch.no_grad(), self.scope():
                return outputs_of(self._called(self._spec.forward, batch))

        return self._attempt(run)

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss and its gradient by leaf."""

        def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            with self.scope():
                return self._loss_and_gradients(batch)

        loss, gradients = self._attempt(run)
        return float(loss), {name: to_numpy(x) for name, x in gradients.items()}

    def forward_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward pass that are not in float64."""
        _ = self.module  # loaded first, for loading is no part of the question
        return self._purity(self._called, self._spec.forward, batch)

    def gradient_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward and backward pass that are not in float64."""
        _ = self.module  # loaded first, for loading is no part of the question
        try:
            return self._purity(self._loss_and_gradients, batch)
        except NotCompared:
            return self.forward_purity(batch)

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Pass inputs and output of every module in a forward pass to `on_trace`."""
        with self.scope():
            capture_torch(self.module, lambda: self._called(self._spec.forward, batch), on_trace)

    def uses(self, batch: Batch) -> Uses:
        """Return how a forward pass uses each leaf."""
        with self.scope():
            return torch_uses(self.module, lambda: self._called(self._spec.forward, batch))

    def backward(self, batch: Batch) -> list[Backward]:
        """Return the gradients of the loss at every module's calls, last call first."""
        with self.scope():
            return backward_torch(self.module, lambda: self._called(self._spec.loss, batch))

    def trainer(self, num_steps: int) -> Trainer:
        """Return a trainer, with a copy of the model, for a schedule of `num_steps`."""
        assert self._spec.trainer is not None, f"{self.name} is not trained"
        module = self._load()
        trainer = self._spec.trainer(module, num_steps)
        if not self._is_lifted:
            return trainer
        held = self._held_by(module)
        return cast(Trainer, Scoped(trainer, lambda: lifted(held)))

    def decoder(self) -> Decoder:
        """Return the model's decoder."""
        assert self._spec.decoder is not None, f"{self.name} has no cache"
        decoder = self._spec.decoder(self.module)
        return cast(Decoder, Scoped(decoder, self.scope)) if self._is_lifted else decoder

    def decoder_traces(self, call: Callable[[Decoder], object]) -> list[Trace]:
        """Return inputs and output of every module while `call` uses the model's decoder."""
        traces: list[Trace] = []
        capture_torch(self.module, lambda: call(self.decoder()), traces.append)
        return traces

    def arguments(self, batch: Batch) -> tuple[tuple, dict[str, object]]:
        """Return the inputs and keywords of a call, in the runner's dtype and on its device."""
        both: tuple[tuple, dict[str, object]] = batch.inputs, dict(batch.keywords)
        return tensors(both, self._dtype, self._device)

    def _called(self, function: Callable[..., Result], batch: Batch) -> Result:
        inputs, keywords = self.arguments(batch)
        return function(self.module, *inputs, **keywords)

    def _load(self) -> torch.nn.Module:
        module = self._spec.build(self._dtype)
        load_torch(module, CastLater(self._leaves, self._dtype))
        self._again = {}
        if self._is_lifted:
            kept = module.state_dict().keys() - set(self._code_leaves)
            constants = self._spec.constants()
            constants = {name: x for name, x in constants.items() if name not in kept}
            self._again = put_constants(module, constants)
        return module.to(self._device).eval()

    @property
    def _is_lifted(self) -> bool:
        return self._lifts and not self._raised_lifted

    def _attempt(self, run: Callable[[], Result]) -> Result:
        """Run; no more lifted from here on, if it raises only lifted."""
        try:
            return run()
        except NotCompared:
            raise
        except Exception as error:
            if not self._is_lifted:
                raise
            self._raised_lifted.append(f"{type(error).__name__} at {line_of_error(error)}")
            first = error
        self.release()
        try:
            return run()
        except Exception:
            self._raised_lifted.clear()
            self.release()
            raise first from None

    @property
    def _constants(self) -> Held:
        if self._held is None:
            self._held = self._held_by(self.module)
        return self._held

    def _held_by(self, module: torch.nn.Module) -> Held:
        return Held(tensors_of(module), self._moves)

    def _purity(self, function: Callable[..., object], *args: object) -> Purity:
        def measured() -> Purity:
            if not self._is_lifted:
                return torch_purity(function, *args)
            with lifted(self._constants) as log:
                function(*args)
            found = log.purity
            return dataclasses.replace(found, lifted=found.lifted | self._again)

        found = self._attempt(measured)
        raised = dict.fromkeys(self._raised_lifted, 1)
        return dataclasses.replace(found, impure=raised | found.impure)

    def _loss_and_gradients(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and its gradient by every parameter that is not frozen."""
        loss = self._called(self._spec.loss, batch)
        named = {name: x for name, x in self.module.named_parameters() if x.requires_grad}
        if not loss.requires_grad:
            return loss.detach(), {name: torch.zeros_like(x) for name, x in named.items()}
        parameters = list(named.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), dict(zip(named, found, strict=True))
