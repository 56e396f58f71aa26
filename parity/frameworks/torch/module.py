"""A PyTorch module as a `ModelSpec`: how it is called, scored and trained.

A `parity.frameworks.handle.Handle`.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from parity.frameworks import default_call
from parity.frameworks.batch import (
    Argument,
    Batch,
    Outputs,
    all_nan,
    output_leaves,
    unequal,
)
from parity.frameworks.capture import Trace
from parity.frameworks.leaves import Arrays, Leaves
from parity.frameworks.protocols import Moments, NotCompared, Unusable
from parity.frameworks.spec import BY_DEFAULT, ModelSpec, ModuleUse
from parity.frameworks.torch.calls import float_leaves, outputs_of, tensors
from parity.frameworks.torch.capture import capture_torch
from parity.frameworks.torch.constants import STATISTICS, Build, constants
from parity.frameworks.torch.draws import draws_at
from parity.frameworks.torch.leaves import cast_torch, copied, numpy_view, torch_leaves
from parity.frameworks.torch.runner import TorchRunner, TorchSpec
from parity.system.random_state import random_state

NAME, MODULE = "torch", torch.nn.Module

# Under these keys optimizers keep a mean of gradients, and what they divide by or its square.
_MEANS = "exp_avg", "grad_avg"
_SQUARES = "exp_avg_sq", "exp_inf", "square_avg", "sum"

# Functions that drop numbers; some have twins in place.
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"}
_DROPOUTS |= {"feature_alpha_dropout", "native_dropout"}

Built = TypeVar("Built")
Loss = Callable[..., torch.Tensor]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
TorchUse = ModuleUse[torch.Tensor, MakeOptimizer]


def spec(
    module: torch.nn.Module,
    use: TorchUse = BY_DEFAULT,
    scored: Sequence[str] | None = None,
    frozen: Collection[str] = (),
) -> TorchSpec:
    """Return the spec of a PyTorch module, which is copied for every use and never changed.

    Args:
        module: the module.
        use: how it is called, scored and trained.
        scored: paths of the leaves of its output that the default loss reads, in order; all floats
            in the order of their paths when None.
        frozen: leaves that are not trained, beside those that the module itself freezes.
    """
    signature = default_call.Signature.of(module, use.call)

    def forward(model: torch.nn.Module, *inputs: object, **keywords: object) -> object:
        given = signature.arguments(inputs, keywords, model.training, _stream)
        return use.call(model, *inputs, **given) if use.call else model(*inputs, **given)

    def projected(model: torch.nn.Module, *inputs: object, **keywords: object) -> torch.Tensor:
        leaves = float_leaves(forward(model, *inputs, **keywords), scored)
        numbers = [torch.view_as_real(x) if x.is_complex() else x for x in leaves]
        output = torch.cat([x.flatten() for x in numbers]) if len(numbers) > 1 else numbers[0]
        weights = torch.from_numpy(default_call.projection(output.numel())).to(output)
        finite = torch.isfinite(output)
        known = output if finite.all() else torch.where(finite, output, torch.zeros_like(output))
        return torch.dot(known.flatten(), weights)

    def build(dtype: str) -> torch.nn.Module:
        model = cast_torch(module, dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        return model

    score, make = use.loss or projected, use.optimizer or adamw
    return ModelSpec(
        name=f"{type(module).__name__} (torch)",
        build=build,
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: TorchTrainer(model, score, make),
        constants=functools.cache(lambda: constants(module, cast(Build | None, use.build))),
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
        if not list(module.parameters()):
            raise NotCompared("the PyTorch model has no parameters to train")
        self._optimizer = optimizer(list(module.parameters()))
        _require_plain_steps(self._optimizer)
        first = next(module.parameters())
        self._dtype, self._device = str(first.dtype.to_real()).removeprefix("torch."), first.device

    def step(self, *inputs: Argument, **keywords: Argument) -> float:
        """Take one optimizer step and return the loss before it."""
        with _NothingDropped():
            return self._step(tensors((inputs, keywords), self._dtype, self._device))

    def _step(self, arguments: tuple[tuple, Mapping[str, object]]) -> float:
        self._optimizer.zero_grad()
        loss = self._loss(self._module, *arguments[0], **arguments[1])
        if loss.requires_grad:
            loss.backward()
        for parameter in self._module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                # An optimizer passes over what nothing uses; one of optax decays it.
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()  # as much memory as the weights
        return float(loss.detach())

    def parameters(self) -> Leaves:
        """Return the present weights and buffers."""
        return torch_leaves(self._module)

    def moments(self) -> Moments:
        """Return the moments of the parameters that have them."""
        first, second, updates = {}, {}, None
        for name, parameter in self._module.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            squares = next((state[key] for key in _SQUARES if key in state), None)
            # That of RMSprop is a momentum of updates and not of gradients.
            keys = _MEANS if squares is not None else (*_MEANS, "momentum_buffer")
            means = next((state[key] for key in keys if key in state), None)
            for moments, found in ((first, means), (second, squares)):
                if isinstance(found, torch.Tensor) and found.shape == parameter.shape:
                    moments[name] = numpy_view(found.cpu())
            if "step" in state:
                updates = max(updates or 0, int(state["step"]))
        return first, second, updates


def _require_plain_steps(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose steps evaluate the loss themselves."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise NotCompared(
            f"{type(optimizer).__name__} evaluates the loss several times a step, by a closure; "
            "only optimizers that take one gradient a step are compared"
        )


class _NothingDropped(TorchFunctionMode):
    """While entered, functions that drop numbers drop none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", "").rstrip("_"), kwargs or {}
        if name == "scaled_dot_product_attention":
            args, kwargs = (*args[:4], *[0.0] * len(args[4:5]), *args[5:]), dict(kwargs)
            kwargs.pop("dropout_p", None)
        elif name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


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


def prepared(module: torch.nn.Module, use: TorchUse, batch: Batch) -> torch.nn.Module:
    """Return a module that can be checked: uncompiled, and with its lazy layers built.

    Raises:
        Unusable: for one that cannot, for it holds no numbers or quantized ones.
    """
    module = _uncompiled(module)
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        module = copied(module)
        inputs, keywords = _arguments(batch)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            spec(module, use).forward(module, *inputs, **keywords)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise Unusable(
                f"{name or 'it'} is scripted. Once cast to float64, a script still has gradients "
                "in float32. Give the module before it is scripted or traced"
            )
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise Unusable(
                f"{name or 'it'} is quantized. Floats are compared. Give the model before it is "
                "quantized"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise Unusable(
                f"{name} is on the device meta, which holds no numbers. A check moves weights. "
                "Build the model on a device that has them"
            )
    return module


def _uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module without the wrappers of torch.compile, which prefix the names of leaves."""
    if "torch._dynamo" not in sys.modules:
        return module
    from torch._dynamo.eval_frame import OptimizedModule

    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    if any(isinstance(part, OptimizedModule) for part in module.modules()):
        module = copied(module)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, OptimizedModule):
                    setattr(parent, name, child._orig_mod)
    return module


def tried(spec: TorchSpec, batch: Batch) -> tuple[Outputs, set[str]]:
    """Return the output of a model as it is built, and the paths of the tensors in it.

    Raises:
        Unusable: for a model whose outputs are random, or NaN throughout.
    """
    model = spec.build("float32").eval()

    def run() -> dict[str, object]:
        inputs, keywords = _arguments(batch)
        return dict(output_leaves(spec.forward(model, *inputs, **keywords)))

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        state = random_state()
        leaves, again = run(), [run()]
        found = outputs_of(leaves)
        if random_state() != state:  # such draws may change nothing, or an output one time in many
            for end in (0.0, 1.0):
                with draws_at(end):
                    again.append(run())
        if any(unequal(found, outputs_of(x)) is not None for x in again):
            raise Unusable(
                "two calls with equal inputs gave different outputs, so it is random or remembers "
                "a call. What is compared must be a function. Turn that off in evaluation"
            )
        if all_nan(found):
            traces: list[Trace] = []
            capture_torch(model, run, traces.append)
            where = next((x.path for x in traces if np.any(np.isnan(x.output))), "")
            raise Unusable(
                f"all outputs are NaN, first that of {where or 'the model itself'}. Nothing can be "
                "compared with NaN. Mend the model or the inputs"
            )
    return found, {path for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}


def _arguments(batch: Batch) -> tuple[tuple, dict[str, object]]:
    both: tuple[tuple, dict[str, object]] = batch.inputs, dict(batch.keywords)
    return tensors(both, "float32", torch.device("cpu"))


def _stream(name: str) -> object:
    return torch.Generator().manual_seed(0)


def initial_leaves(spec: TorchSpec, dtype: str) -> Leaves:
    """Return the weights that a model is built with."""
    return torch_leaves(spec.build(dtype))


def trained(module: torch.nn.Module) -> set[str]:
    """Return the names of the leaves that training moves by their gradient."""
    return {name for name, x in module.named_parameters(remove_duplicate=False) if x.requires_grad}


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
