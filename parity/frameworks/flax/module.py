"""Any Flax NNX module as a `ModelSpec`: how it is called, scored and trained.

A `parity.frameworks.handle.Handle`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity.frameworks import default_call
from parity.frameworks.flax.leaves import StaticCasts, cast_flax, flax_leaves, state_leaves
from parity.frameworks.flax.runner import FlaxRunner, FlaxSpec
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Arrays, Leaves, cast_array
from parity.frameworks.protocols import Moments
from parity.frameworks.spec import BY_DEFAULT, ModelSpec, ModuleUse

NAME, MODULE = "flax", nnx.Module

Built = TypeVar("Built")
Loss = Callable[..., jax.Array]
FlaxUse = ModuleUse[jax.Array, optax.GradientTransformation]
# (parameters, rest, optimizer state, *inputs) to the loss and these three after a step
Step = Callable[..., tuple[jax.Array, nnx.State, nnx.State, optax.OptState]]
Program = Callable[[nnx.GraphDef[nnx.Module]], Step]


def spec(module: nnx.Module, use: FlaxUse = BY_DEFAULT) -> FlaxSpec:
    """Return the spec of a Flax NNX module, which is copied for every use and never changed."""

    def forward(model: nnx.Module, *inputs: jax.Array) -> jax.Array:
        output = use.call(model, *inputs) if use.call else model(*inputs)
        arrays = default_call.arrays_in("flax", output, jax.Array)
        return arrays[0] if len(arrays) == 1 else jnp.concatenate([x.ravel() for x in arrays])

    def projected(model: nnx.Module, *inputs: jax.Array) -> jax.Array:
        output = forward(model, *inputs)
        weights = jnp.asarray(default_call.projection(output.size), output.dtype)
        return jnp.dot(output.ravel(), weights)

    score, optimizer = use.loss or projected, use.optimizer or adamw()
    program, casts = compile_step(score, optimizer), StaticCasts()
    return ModelSpec(
        name=f"{type(module).__name__} (flax)",
        build=lambda dtype: cast_flax(module, dtype, casts),
        forward=forward,
        loss=score,
        trainer=lambda model, num_steps: FlaxTrainer(model, program, optimizer),
    )


class FlaxTrainer:
    """Training by jax.value_and_grad and optax, in training mode but without dropout.

    `program` is that of `compile_step`, compiled with this optimizer.
    """

    def __init__(
        self, module: nnx.Module, program: Program, optimizer: optax.GradientTransformation
    ):
        module.train()
        # Nothing is dropped, for the frameworks draw masks from different generators.
        for _, submodule in nnx.iter_modules(module):
            if isinstance(submodule, nnx.Dropout):
                submodule.rate = 0.0
            if isinstance(submodule, nnx.MultiHeadAttention):
                submodule.dropout_rate = 0.0
        self._graphdef, self._parameters, self._rest = nnx.split(module, nnx.Param, ...)
        self._step, self._state = program(self._graphdef), optimizer.init(self._parameters)
        self._dtype = str(jax.tree.leaves(self._parameters)[0].dtype)

    def step(self, *inputs: np.ndarray) -> float:
        """Take one optimizer step and return the loss before it."""
        arrays = [jnp.asarray(cast_array(x, self._dtype)) for x in inputs]
        loss, self._parameters, self._rest, self._state = self._step(
            self._parameters, self._rest, self._state, *arrays
        )
        return float(loss)

    def parameters(self) -> Leaves:
        """Return the present weights and statistics."""
        return flax_leaves(nnx.merge(self._graphdef, self._parameters, self._rest))

    def moments(self) -> Moments:
        """Return the moments of the first Adam state of the optimizer, if it has one."""
        found = [x for x in jax.tree.leaves(self._state, is_leaf=_is_adam) if _is_adam(x)]
        if not found:
            return {}, {}, 0
        return state_leaves(found[0].mu), state_leaves(found[0].nu), int(found[0].count)


def compile_step(loss: Loss, optimizer: optax.GradientTransformation) -> Program:
    """Return a training step for each graph, compiled once for all trainers of equal ones."""
    # The graph is no argument of what is compiled, for it may hold what has no hash, as configs do.
    compiled: list[tuple[nnx.GraphDef[nnx.Module], Step]] = []

    def program(graphdef: nnx.GraphDef[nnx.Module]) -> Step:
        for known, found in compiled:
            if _are_equal(known, graphdef):
                return found
        compiled.append((graphdef, jax.jit(functools.partial(step, graphdef))))
        return compiled[-1][1]

    def step(graphdef: Any, parameters: Any, rest: Any, state: Any, *arrays: jax.Array) -> tuple:
        def scored(parameters: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, parameters, rest, copy=True)  # statistics change in it
            value = loss(model, *arrays)
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, rest), gradients = jax.value_and_grad(scored, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return value, optax.apply_updates(parameters, updates), rest, state

    return program


def _are_equal(a: nnx.GraphDef[nnx.Module], b: nnx.GraphDef[nnx.Module]) -> bool:
    try:
        return bool(a == b)
    except Exception:  # arrays among the static parts have no truth value
        return False


def adamw() -> optax.GradientTransformation:
    """Return AdamW with the constants of `default_call`, as torch computes it.

    `optax.adamw` computes the bias correction 1 - beta**count in float32, which at count 1 is off
    by 1e-5, where torch uses Python's doubles.
    """
    beta1, beta2 = default_call.BETA1, default_call.BETA2

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            # -expm1(n log b) is 1 - b**n without the cancellation.
            steps = count.astype(m.dtype)
            m_hat = m / -jnp.expm1(steps * math.log(beta1))
            v_hat = v / -jnp.expm1(steps * math.log(beta2))
            return m_hat / (jnp.sqrt(v_hat) + default_call.EPSILON)

        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, updates)
        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(default_call.WEIGHT_DECAY),
        optax.scale_by_learning_rate(default_call.LEARNING_RATE),
    )


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Return what a function builds; Flax draws from streams of the user's own."""
    return build()


def initial_leaves(spec: FlaxSpec, dtype: str) -> Leaves:
    """Return the weights that a model is built with, on the CPU."""
    with jax_scope(dtype, jax.devices("cpu")[0]):
        return flax_leaves(spec.build(dtype))


def code_leaves(module: nnx.Module) -> tuple[str, ...]:
    """Return no names: what a Flax module holds is its weights."""
    return ()


def runner(spec: FlaxSpec, weights: Arrays) -> FlaxRunner:
    """Return a runner in float64 on the CPU."""
    return FlaxRunner(spec, weights, "float64", jax.devices("cpu")[0])


def learning_rate(module: nnx.Module, optimizer: optax.GradientTransformation | None) -> float:
    """Return the default learning rate; an optimizer of the user's does not reveal its own."""
    if optimizer is not None:
        raise ValueError(
            "record: an optimizer of optax does not tell its learning rate. Single updates are "
            "judged in learning rates. Give learning_rate."
        )
    return default_call.LEARNING_RATE


def _is_adam(state: object) -> bool:
    return all(hasattr(state, name) for name in ("mu", "nu", "count"))
