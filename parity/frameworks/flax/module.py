"""Any Flax NNX module, a way to call it and an optimizer as one half of a pair.

Read beside parity/torch_spec.py; the two trainers have the same methods, those that the levels ask
for.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_gpt
from parity.frameworks.capture import leaves_of
from parity.frameworks.default_call import plain_call, projection, require_output
from parity.frameworks.flax.leaves import flax_leaves, state_leaves
from parity.frameworks.flax.purity import flax_in
from parity.frameworks.leaves import Leaves, cast_array
from parity.frameworks.spec import ModelSpec

Call = Callable[..., Any]
# What the optimizer is when the user names none.
CONSTANTS = flax_gpt.TrainConfig(schedule="constant", decay_all=True)


def flax_spec(
    module: nnx.Module,
    call: Call | None = None,
    loss: Call | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> ModelSpec:
    """A Flax NNX module as a side; see `torch_spec`.

    Args:
        module: copied for every use, and never changed.
        call: (module, *inputs) to its output; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar; the output times fixed random numbers when None.
        optimizer: an optax transformation; AdamW as torch's when None.
    """
    call = call or plain_call

    def forward(model: nnx.Module, *inputs: jax.Array) -> jax.Array:
        arrays = [x for x in leaves_of(call(model, *inputs)) if isinstance(x, jax.Array)]
        require_output("flax", arrays)
        return arrays[0] if len(arrays) == 1 else jnp.concatenate([x.ravel() for x in arrays])

    def projected(model: nnx.Module, *inputs: jax.Array) -> jax.Array:
        output = forward(model, *inputs)
        return jnp.dot(output.ravel(), jnp.asarray(projection(output.size), output.dtype))

    score, optimizer = loss or projected, optimizer or flax_gpt.adamw(CONSTANTS)
    program = flax_program(score, optimizer)
    return ModelSpec(
        name=f"{type(module).__name__} (flax)",
        build=lambda dtype: flax_in(module, dtype),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: FlaxTrainer(model, program, optimizer),
    )


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
        """First and second moments by leaf, where there are such, and the number of updates.

        They are to be read before the next step.
        """
        found = [x for x in jax.tree.leaves(self._state, is_leaf=_is_adam) if _is_adam(x)]
        if not found:
            return {}, {}, 0
        return state_leaves(found[0].mu), state_leaves(found[0].nu), int(found[0].count)


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


def _is_adam(state: Any) -> bool:
    return all(hasattr(state, name) for name in ("mu", "nu", "count"))


def _without_dropout(module: Any) -> None:
    """Masks come from other generators in the two frameworks, so nothing is to be dropped."""
    if isinstance(module, nnx.Dropout):
        module.rate = 0.0
    if isinstance(module, nnx.MultiHeadAttention):
        module.dropout_rate = 0.0
