"""Any PyTorch module as a `ModelSpec`: how it is called, scored and trained."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from parity.frameworks import default_call
from parity.frameworks.capture import leaves_of
from parity.frameworks.leaves import Leaves, cast_array
from parity.frameworks.protocols import Moments
from parity.frameworks.spec import ModelSpec, ModuleUse
from parity.frameworks.torch.leaves import cast_torch, from_numpy, numpy_view, torch_leaves

Loss = Callable[..., torch.Tensor]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
TorchUse = ModuleUse[torch.Tensor, MakeOptimizer]


def torch_spec(
    module: torch.nn.Module,
    call: Callable[..., object] | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
) -> ModelSpec[torch.nn.Module, torch.Tensor]:
    """Return the spec of a PyTorch module.

    Args:
        module: copied for every use, and never changed.
        call: (module, *inputs) to outputs; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar; the outputs times `projection` when None.
        optimizer: parameters to an optimizer; `adamw` when None.
    """
    call = call or default_call.plain_call

    def forward(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        arrays = [x for x in leaves_of(call(model, *inputs)) if isinstance(x, torch.Tensor)]
        default_call.require_output("torch", arrays)
        return arrays[0] if len(arrays) == 1 else torch.cat([x.flatten() for x in arrays])

    def projected(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        output = forward(model, *inputs)
        weights = torch.from_numpy(default_call.projection(output.numel())).to(output)
        return torch.dot(output.flatten(), weights)

    score, make = loss or projected, optimizer or adamw
    return ModelSpec(
        name=f"{type(module).__name__} (torch)",
        build=lambda dtype: cast_torch(module, dtype),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: TorchTrainer(model, score, make),
    )


class TorchTrainer:
    """Training by loss.backward() and optimizer.step(), in training mode but without dropout.

    Args:
        module: with its initial weights.
        loss: (module, *inputs) to a scalar.
        optimizer: parameters to an optimizer.
    """

    def __init__(self, module: torch.nn.Module, loss: Loss, optimizer: MakeOptimizer):
        self._module, self._loss = module.train(), loss
        for submodule in module.modules():
            _disable_dropout(submodule)
        self._optimizer = optimizer(list(module.parameters()))
        first = next(module.parameters())
        self._dtype, self._device = str(first.dtype).removeprefix("torch."), first.device

    def step(self, *inputs: np.ndarray) -> float:
        """Take one optimizer step and return the loss before it."""
        tensors = [from_numpy(cast_array(x, self._dtype)).to(self._device) for x in inputs]
        self._optimizer.zero_grad()
        loss = self._loss(self._module, *tensors)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()  # as much memory as the weights
        return float(loss.detach())

    def parameters(self) -> Leaves:
        """Return the present weights and buffers."""
        return torch_leaves(self._module)

    def moments(self) -> Moments:
        """Return Adam's moments of the parameters that have them."""
        first, second, updates = {}, {}, 0
        for name, parameter in self._module.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                first[name], second[name] = (
                    numpy_view(state[kind].cpu()) for kind in ("exp_avg", "exp_avg_sq")
                )
                updates = max(updates, int(state["step"]))
        return first, second, updates


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW with the constants of `default_call`."""
    return torch.optim.AdamW(
        parameters,
        lr=default_call.LEARNING_RATE,
        betas=(default_call.BETA1, default_call.BETA2),
        eps=default_call.EPSILON,
        weight_decay=default_call.WEIGHT_DECAY,
    )


def largest_learning_rate(module: torch.nn.Module, optimizer: MakeOptimizer | None) -> float:
    """Return the largest learning rate among the parameter groups of a module's optimizer."""
    groups = (optimizer or adamw)(list(module.parameters())).param_groups
    return max(float(group["lr"]) for group in groups)


def _disable_dropout(module: torch.nn.Module) -> None:
    """Drop nothing: the frameworks draw masks from different generators."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        module.p = 0.0
    if isinstance(module, torch.nn.MultiheadAttention | torch.nn.RNNBase):
        module.dropout = 0.0
