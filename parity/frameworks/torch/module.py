"""Any PyTorch module as a `ModelSpec`: how it is called, scored and trained.

A `parity.frameworks.handle.Handle`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from parity.frameworks import default_call
from parity.frameworks.batch import Argument
from parity.frameworks.leaves import Arrays, Leaves
from parity.frameworks.protocols import Moments
from parity.frameworks.spec import BY_DEFAULT, ModelSpec, ModuleUse
from parity.frameworks.torch.calls import float_leaves, tensors
from parity.frameworks.torch.constants import STATISTICS, constants
from parity.frameworks.torch.leaves import cast_torch, numpy_view, torch_leaves
from parity.frameworks.torch.runner import TorchRunner, TorchSpec

NAME, MODULE = "torch", torch.nn.Module

Built = TypeVar("Built")
Loss = Callable[..., torch.Tensor]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
TorchUse = ModuleUse[torch.Tensor, MakeOptimizer]


def spec(module: torch.nn.Module, use: TorchUse = BY_DEFAULT) -> TorchSpec:
    """Return the spec of a PyTorch module, which is copied for every use and never changed."""

    def forward(model: torch.nn.Module, *inputs: object, **keywords: object) -> object:
        return (use.call or default_call.call)(model, *inputs, **keywords)

    def projected(model: torch.nn.Module, *inputs: object, **keywords: object) -> torch.Tensor:
        leaves = float_leaves(forward(model, *inputs, **keywords))
        numbers = [torch.view_as_real(x) if x.is_complex() else x for x in leaves]
        output = torch.cat([x.flatten() for x in numbers]) if len(numbers) > 1 else numbers[0]
        weights = torch.from_numpy(default_call.projection(output.numel())).to(output)
        return torch.dot(output.flatten(), weights)

    score, make = use.loss or projected, use.optimizer or adamw
    return ModelSpec(
        name=f"{type(module).__name__} (torch)",
        build=lambda dtype: cast_torch(module, dtype),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: TorchTrainer(model, score, make),
        constants=functools.cache(lambda: constants(module, use.build)),
    )


class TorchTrainer:
    """Training by loss.backward() and optimizer.step(), in training mode but without dropout."""

    def __init__(self, module: torch.nn.Module, loss: Loss, optimizer: MakeOptimizer):
        self._module, self._loss = module.train(), loss
        # Nothing is dropped, for the frameworks draw masks from different generators.
        for submodule in module.modules():
            if isinstance(submodule, torch.nn.modules.dropout._DropoutNd):
                submodule.p = 0.0
            if isinstance(submodule, torch.nn.MultiheadAttention | torch.nn.RNNBase):
                submodule.dropout = 0.0
        self._optimizer = optimizer(list(module.parameters()))
        first = next(module.parameters())
        self._dtype, self._device = str(first.dtype).removeprefix("torch."), first.device

    def step(self, *inputs: Argument, **keywords: Argument) -> float:
        """Take one optimizer step and return the loss before it."""
        arguments = tensors((inputs, keywords), self._dtype, self._device)
        self._optimizer.zero_grad()
        loss = self._loss(self._module, *arguments[0], **arguments[1])
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
                first[name] = numpy_view(state["exp_avg"].cpu())
                second[name] = numpy_view(state["exp_avg_sq"].cpu())
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


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Return what a function builds, with torch's own generator at a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def initial_leaves(spec: TorchSpec, dtype: str) -> Leaves:
    """Return the weights that a model is built with."""
    return torch_leaves(spec.build(dtype))


def code_leaves(module: torch.nn.Module) -> tuple[str, ...]:
    """Name the buffers that are no statistics, such as masks and tables of angles."""
    names = (name for name, _ in module.named_buffers())
    return tuple(name for name in names if name.rpartition(".")[2] not in STATISTICS)


def runner(spec: TorchSpec, weights: Arrays) -> TorchRunner:
    """Return a runner in float64 on the CPU."""
    return TorchRunner(spec, weights, "float64", torch.device("cpu"), lift=True)


def learning_rate(module: torch.nn.Module, optimizer: MakeOptimizer | None) -> float:
    """Return the largest learning rate among the parameter groups of a module's optimizer."""
    groups = (optimizer or adamw)(list(module.parameters())).param_groups
    return max(float(group["lr"]) for group in groups)
