"""Any PyTorch module, a way to call it and an optimizer as one half of a pair.

Read beside parity/flax_spec.py; the two trainers have the same methods, those that the levels ask
for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import torch_gpt
from parity.frameworks.capture import leaves_of
from parity.frameworks.default_call import plain_call, projection, require_output
from parity.frameworks.leaves import Leaves, cast_array
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.leaves import from_numpy, numpy_view, torch_leaves
from parity.frameworks.torch.purity import torch_in

Call = Callable[..., Any]
# What the optimizer is when the user names none.
CONSTANTS = torch_gpt.TrainConfig(schedule="constant", decay_all=True)


def torch_spec(
    module: torch.nn.Module,
    call: Call | None = None,
    loss: Call | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> ModelSpec:
    """A PyTorch module as a side.

    Args:
        module: copied for every use, and never changed.
        call: (module, *inputs) to its output; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar; the output times fixed random numbers when None, so
            that every part of the output has a gradient of its own.
        optimizer: parameters to an optimizer; AdamW when None.
    """
    call = call or plain_call

    def forward(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        arrays = [x for x in leaves_of(call(model, *inputs)) if isinstance(x, torch.Tensor)]
        require_output("torch", arrays)
        return arrays[0] if len(arrays) == 1 else torch.cat([x.flatten() for x in arrays])

    def projected(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        output = forward(model, *inputs)
        weights = torch.from_numpy(projection(output.numel())).to(output)
        return torch.dot(output.flatten(), weights)

    score = loss or projected
    return ModelSpec(
        name=f"{type(module).__name__} (torch)",
        build=lambda dtype: torch_in(module, dtype),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: TorchTrainer(model, score, optimizer),
    )


class TorchTrainer:
    """Training by loss.backward() and optimizer.step(), in training mode but without dropout.

    Args:
        module: with its initial weights.
        loss: (module, *inputs) to a scalar.
        optimizer: parameters to an optimizer; AdamW when None.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: Callable[[Any], torch.optim.Optimizer] | None,
    ):
        self._module, self._loss = module.train(), loss
        for submodule in module.modules():
            _without_dropout(submodule)
        self._optimizer = (optimizer or _adamw)(list(module.parameters()))
        first = next(module.parameters())
        self._dtype, self._device = str(first.dtype).removeprefix("torch."), first.device

    @property
    def learning_rate(self) -> float:
        """The largest of the optimizer's groups."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def step(self, *inputs: np.ndarray) -> float:
        """One step; the loss before it."""
        tensors = [from_numpy(cast_array(x, self._dtype)).to(self._device) for x in inputs]
        self._optimizer.zero_grad()
        loss = self._loss(self._module, *tensors)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()  # as much memory as the weights
        return float(loss.detach())

    def parameters(self) -> Leaves:
        """The present weights and buffers."""
        return torch_leaves(self._module)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, where there are such, and the number of updates.

        They are to be read before the next step.
        """
        first, second, updates = {}, {}, 0
        for name, parameter in self._module.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                first[name], second[name] = (
                    numpy_view(state[kind].cpu()) for kind in ("exp_avg", "exp_avg_sq")
                )
                updates = max(updates, int(state["step"]))
        return first, second, updates


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=CONSTANTS.learning_rate,
        betas=(CONSTANTS.beta1, CONSTANTS.beta2),
        eps=CONSTANTS.epsilon,
        weight_decay=CONSTANTS.weight_decay,
    )


def _without_dropout(module: torch.nn.Module) -> None:
    """Masks come from other generators in the two frameworks, so nothing is to be dropped."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        module.p = 0.0
    if isinstance(module, torch.nn.MultiheadAttention | torch.nn.RNNBase):
        module.dropout = 0.0
