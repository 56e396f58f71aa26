"""Training of either module with an optimizer of its framework, all state as named arrays.

The two classes have the same methods, those that the levels ask for.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import flax_gpt
from parity.leaves import (
    Leaves,
    cast_array,
    dotted,
    flax_leaves,
    from_numpy,
    to_numpy,
    torch_leaves,
)

# What both optimizers are when the user names none.
CONSTANTS = flax_gpt.TrainConfig(schedule="constant", decay_all=True)


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
        return float(loss.detach())

    def parameters(self) -> Leaves:
        """The present weights and buffers."""
        return torch_leaves(self._module)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, as far as the optimizer keeps such, and its count."""
        first, second, updates = {}, {}, 0
        for name, parameter in self._module.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            if "exp_avg" in state:
                first[name], second[name] = map(to_numpy, (state["exp_avg"], state["exp_avg_sq"]))
                updates = max(updates, int(state["step"]))
        return first, second, updates


class FlaxTrainer:
    """Training by jax.value_and_grad and optax, in training mode but without dropout.

    Args:
        module: with its initial weights.
        program: see `flax_program`.
        optimizer: the program's.
    """

    def __init__(
        self, module: nnx.Module, program: Callable, optimizer: optax.GradientTransformation
    ):
        module.train()
        for _, submodule in nnx.iter_modules(module):
            _without_dropout(submodule)
        self._graphdef, self._parameters, self._rest = nnx.split(module, nnx.Param, ...)
        self._program, self._state = program, optimizer.init(self._parameters)
        self._dtype = str(jax.tree.leaves(self._parameters)[0].dtype)

    def step(self, *inputs: np.ndarray) -> float:
        """One step; the loss before it."""
        arrays = [jnp.asarray(cast_array(x, self._dtype)) for x in inputs]
        loss, self._parameters, self._rest, self._state = self._program(
            self._graphdef, self._parameters, self._rest, self._state, *arrays
        )
        return float(loss)

    def parameters(self) -> Leaves:
        """The present weights and statistics."""
        return flax_leaves(nnx.merge(self._graphdef, self._parameters, self._rest))

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, as far as the optimizer keeps such, and its count."""
        found = [x for x in jax.tree.leaves(self._state, is_leaf=_is_adam) if _is_adam(x)]
        if not found:
            return {}, {}, 0
        return _by_path(found[0].mu), _by_path(found[0].nu), int(found[0].count)


def flax_program(
    loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation
) -> Callable:
    """A compiled training step, which trainers of one side share.

    Args:
        loss: (module, *inputs) to a scalar.
        optimizer: an optax transformation.

    Returns:
        (graphdef, parameters, rest, state, *inputs) to the loss and the last three after the step.
    """

    def step(graphdef: Any, parameters: Any, rest: Any, state: Any, *arrays: jax.Array) -> tuple:
        def scored(parameters: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, parameters, rest, copy=True)  # it moves its statistics
            value = loss(model, *arrays)
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(scored, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return value, optax.apply_updates(parameters, updates), rest, state

    return jax.jit(step, static_argnums=0)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=CONSTANTS.learning_rate,
        betas=(CONSTANTS.beta1, CONSTANTS.beta2),
        eps=CONSTANTS.epsilon,
        weight_decay=CONSTANTS.weight_decay,
    )


def _is_adam(state: Any) -> bool:
    return all(hasattr(state, name) for name in ("mu", "nu", "count"))


def _by_path(state: Any) -> Leaves:
    return {dotted(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(state)}


def _without_dropout(module: Any) -> None:
    """Masks come from other generators in the two frameworks, so nothing is to be dropped."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        module.p = 0.0
    if isinstance(module, torch.nn.MultiheadAttention | torch.nn.RNNBase):
        module.dropout = 0.0
    if isinstance(module, nnx.Dropout):
        module.rate = 0.0
    if isinstance(module, nnx.MultiHeadAttention):
        module.dropout_rate = 0.0
