"""Inputs, outputs and gradients of every submodule's calls in a PyTorch module."""

import contextlib
from collections.abc import Callable

import numpy as np
import torch

from parity.frameworks.capture import Backward, OnTrace, ValueT, emit, map_leaves
from parity.frameworks.torch.leaves import to_numpy


def capture_torch(module: torch.nn.Module, call: Callable[[], object], on_trace: OnTrace) -> None:
    """Run `call` and emit a trace of every submodule's calls, in order of completion."""

    def hook(path: str):
        def record(_, inputs: tuple, keywords: dict, output: object) -> None:
            emit(on_trace, path, (inputs, keywords), output, torch.Tensor, to_numpy)

        return record

    with contextlib.ExitStack() as stack, torch.no_grad():
        for path, submodule in module.named_modules():
            handle = submodule.register_forward_hook(hook(path), with_kwargs=True)
            stack.enter_context(handle)
        call()


def backward_torch(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> list[Backward]:
    """Return the gradients of a loss at every submodule's calls, the last call first.

    Every float that goes in or comes out is replaced by a copy, so that an operation in place is
    not mistaken for what came before it, nor one reader of a tensor for another.
    """
    calls: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = []
    running: list[list[torch.Tensor]] = []

    def hooks(path: str):
        def enter(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            inputs, outputs = [], []
            calls.append((path, inputs, outputs))
            running.append(outputs)

            def copied(x: torch.Tensor) -> torch.Tensor:
                inputs.append(x.clone() if x.requires_grad else x.clone().requires_grad_())
                return inputs[-1].clone()

            return _with_floats((args, kwargs), copied)

        def leave(_, args: tuple, output: object) -> object:
            outputs = running.pop()

            def copied(x: torch.Tensor) -> torch.Tensor:
                if outputs or not x.requires_grad:
                    return x
                outputs.append(x)
                return x.clone()

            return _with_floats(output, copied)

        return enter, leave

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for path, submodule in module.named_modules():
            enter, leave = hooks(path)
            stack.enter_context(submodule.register_forward_pre_hook(enter, with_kwargs=True))
            stack.enter_context(submodule.register_forward_hook(leave))
        value = loss()
        tensors = [x for _, *both in calls for group in both for x in group]
        gradients = iter(torch.autograd.grad(value, tensors, allow_unused=True))

    def passed(tensors: list[torch.Tensor]) -> tuple[np.ndarray, ...]:
        found = ((x, next(gradients)) for x in tensors)
        return tuple(to_numpy(torch.zeros_like(x) if g is None else g) for x, g in found)

    back = []
    for path, inputs, outputs in calls:
        by_inputs, by_output = passed(inputs), passed(outputs)
        back.append(Backward(path, by_inputs, by_output[0] if by_output else None))
    return back[::-1]


def _with_floats(value: ValueT, change: Callable[[torch.Tensor], object]) -> ValueT:
    """Apply `change` to the float tensors among arguments or outputs."""

    def changed(x: object) -> object:
        return change(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return map_leaves(value, changed)
