"""What goes into and comes out of every submodule of a PyTorch module, forward and backward.

Read beside parity/flax_capture.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from parity.frameworks.capture import Backward, OnTrace, emit
from parity.frameworks.torch.leaves import to_numpy


def capture_torch(module: torch.nn.Module, call: Callable[[], Any], on_trace: OnTrace) -> None:
    """Runs `call` and tells what every submodule took and gave, in order of completion."""

    def hook(path: str):
        def record(_, inputs: tuple, keywords: dict, output: Any) -> None:
            emit(on_trace, path, (inputs, keywords), output, torch.Tensor, to_numpy)

        return record

    handles = [
        submodule.register_forward_hook(hook(path), with_kwargs=True)
        for path, submodule in module.named_modules()
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()


def backward_torch(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> list[Backward]:
    """The gradients of a loss by what every call of a submodule took and gave, the last one first.

    Every float that goes in or comes out is replaced by a copy of itself, so that what a module
    does in place is not mistaken for what came before, nor one reader of a tensor for another.
    """
    calls: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]] = []
    running: list[list[torch.Tensor]] = []

    def hook(path: str):
        def enter(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            inputs, outputs = call = [], []
            calls.append((path, *call))
            running.append(outputs)

            def copied(x: torch.Tensor) -> torch.Tensor:
                inputs.append(x.clone() if x.requires_grad else x.clone().requires_grad_())
                return inputs[-1].clone()

            return _with_floats((args, kwargs), copied)

        def leave(_, args: tuple, output: Any) -> Any:
            outputs = running.pop()

            def copied(x: torch.Tensor) -> torch.Tensor:
                if outputs or not x.requires_grad:
                    return x
                outputs.append(x)
                return x.clone()

            return _with_floats(output, copied)

        return enter, leave

    handles = []
    for path, submodule in module.named_modules():
        enter, leave = hook(path)
        handles.append(submodule.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(submodule.register_forward_hook(leave))
    try:
        with torch.enable_grad():
            value = loss()
            tensors = [x for _, *sides in calls for side in sides for x in side]
            gradients = iter(torch.autograd.grad(value, tensors, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()

    def passed(tensors: list[torch.Tensor]) -> tuple[np.ndarray, ...]:
        found = ((x, next(gradients)) for x in tensors)
        return tuple(to_numpy(torch.zeros_like(x) if g is None else g) for x, g in found)

    back = []
    for path, inputs, outputs in calls:
        taken, given = passed(inputs), passed(outputs)
        back.append(Backward(path, taken, given[0] if given else None))
    return back[::-1]


def _with_floats(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Arguments or an output, with the tensors of floats among them changed."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_with_floats(x, change) for x in value)
    if type(value) is dict:
        return {key: _with_floats(x, change) for key, x in value.items()}
    return value
