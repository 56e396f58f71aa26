"""A module, a way to call it and an optimizer as one half of a pair."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import flax_gpt
from parity.capture import leaves_of
from parity.foreign.trainers import CONSTANTS, FlaxTrainer, TorchTrainer, flax_program
from parity.oracle import flax_in, torch_in
from parity.pair import Side

Call = Callable[..., Any]


def torch_side(
    module: torch.nn.Module,
    call: Call | None = None,
    loss: Call | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
) -> Side:
    """A PyTorch module as a side.

    Args:
        module: copied for every use, and never changed.
        call: (module, *inputs) to its output; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar; the output times fixed random numbers when None, so
            that every part of the output has a gradient of its own.
        optimizer: parameters to an optimizer; AdamW when None.
    """
    call = call or _call

    def forward(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        arrays = [x for x in leaves_of(call(model, *inputs)) if isinstance(x, torch.Tensor)]
        _require_output("torch", arrays)
        return arrays[0] if len(arrays) == 1 else torch.cat([x.flatten() for x in arrays])

    def projected(model: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        output = forward(model, *inputs)
        weights = torch.from_numpy(projection(output.numel())).to(output)
        return torch.dot(output.flatten(), weights)

    score = loss or projected
    return Side(
        name=f"{type(module).__name__} (torch)",
        build=lambda dtype: torch_in(module, dtype),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: TorchTrainer(model, score, optimizer),
    )


def flax_side(
    module: nnx.Module,
    call: Call | None = None,
    loss: Call | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Side:
    """A Flax NNX module as a side; see `torch_side`.

    Args:
        module: copied for every use, and never changed.
        call: (module, *inputs) to its output; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar; the output times fixed random numbers when None.
        optimizer: an optax transformation; AdamW as torch's when None.
    """
    call = call or _call

    def forward(model: nnx.Module, *inputs: jax.Array) -> jax.Array:
        arrays = [x for x in leaves_of(call(model, *inputs)) if isinstance(x, jax.Array)]
        _require_output("flax", arrays)
        return arrays[0] if len(arrays) == 1 else jnp.concatenate([x.ravel() for x in arrays])

    def projected(model: nnx.Module, *inputs: jax.Array) -> jax.Array:
        output = forward(model, *inputs)
        return jnp.dot(output.ravel(), jnp.asarray(projection(output.size), output.dtype))

    score, optimizer = loss or projected, optimizer or flax_gpt.adamw(CONSTANTS)
    program = flax_program(score, optimizer)
    return Side(
        name=f"{type(module).__name__} (flax)",
        build=lambda dtype: flax_in(module, dtype),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: FlaxTrainer(model, program, optimizer),
    )


def projection(size: int) -> np.ndarray:
    """Fixed random numbers that make a scalar of an output, about as large as one of its parts."""
    return np.random.default_rng(0).normal(size=size) / np.sqrt(size)


def _call(module: Any, *inputs: Any) -> Any:
    return module(*inputs)


def _require_output(framework: str, arrays: list[Any]) -> None:
    if not arrays:
        raise ValueError(
            f"{framework}: the call gave no array. A check compares arrays. Give a call that "
            "returns them."
        )
