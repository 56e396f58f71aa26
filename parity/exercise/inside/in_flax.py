"""A Flax starter's model, for the stages. `in_torch` has the same functions."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import probes
from .probes import Array, Leaves, Model, Starter

NAME = "flax"


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Compute in float64."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        yield


def array(x: Array) -> np.ndarray:
    """Copy an array to the host."""
    return np.asarray(x)


def ids(tokens: np.ndarray) -> jax.Array:
    """Convert tokens to an array of the framework."""
    return jnp.asarray(tokens, jnp.int32)


def build(modules: Starter) -> Model:
    """Build the starter's model with the grader's weights."""
    model = modules.model.GPT(modules.model.Config(**probes.SIZES), seed=0)
    leaves(model)
    wanted = probes.to_native(probes.weights(), NAME)
    for name, variable in _variables(model).items():
        variable.set_value(jnp.asarray(wanted[name]))
    return model


def leaves(model: Model, sizes: Mapping[str, int] = probes.SIZES) -> Leaves:
    """Return the model's parameters."""
    found = {name: np.array(variable[...]) for name, variable in _variables(model).items()}
    return probes.from_native(found, NAME, sizes)


def _variables(model: Model) -> dict[str, nnx.Variable]:
    """Return parameters by name, and what has a parameter's name without being one."""
    names = probes.to_native(probes.weights(), NAME)
    found = {_dotted(path): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    return {
        name: variable
        for name, variable in found.items()
        if name in names or isinstance(variable, nnx.Param)
    }


def _dotted(path: tuple[Hashable, ...]) -> str:
    return ".".join(map(str, path))


def logits_and_gradients(model: Model, tokens: np.ndarray) -> tuple[np.ndarray, Leaves]:
    """Return logits and the gradient of a fixed sum of them, by the framework's names."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def differentiated(parameters: nnx.State) -> tuple[nnx.State, jax.Array]:
        def fixed_sum(parameters: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits_BTV = probes.logits_of(nnx.merge(graph, parameters, rest)(ids(tokens)))
            return (logits_BTV * probes.direction("logits", logits_BTV.shape)).sum(), logits_BTV

        return jax.grad(fixed_sum, has_aux=True)(parameters)

    by_path, logits_BTV = differentiated(parameters)
    variables = _variables(model)
    gradients = {name: np.zeros(variable[...].shape) for name, variable in variables.items()}
    gradients |= {_dotted(p): np.array(gradient[...]) for p, gradient in nnx.to_flat_state(by_path)}
    return array(logits_BTV), gradients


def loss_and_gradient(
    loss: Callable[..., jax.Array], logits: np.ndarray, tokens: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the loss of logits and its gradient."""
    tokens_BT = ids(tokens)
    differentiated = jax.jit(jax.value_and_grad(lambda logits_BTV: loss(logits_BTV, tokens_BT)))
    value, gradient_BTV = differentiated(jnp.asarray(logits))
    return value.item(), array(gradient_BTV)


def reader(model: Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from tokens to logits, compiled for each shape."""
    graph, state = nnx.split(model)

    @jax.jit
    def compiled(state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
        return probes.logits_of(nnx.merge(graph, state)(tokens_BT))

    return lambda tokens: array(compiled(state, ids(tokens)))


def read_on(model: Model, tokens: np.ndarray, cache: object) -> tuple[np.ndarray, object]:
    """Return logits, and the cache with the tokens in it."""
    logits_BTV, cache = model(ids(tokens), cache)
    return array(logits_BTV), cache


@contextlib.contextmanager
def moved_position(model: Model, position: int) -> Iterator[None]:
    """Change the vector of one position."""
    table = model.position_embedding.embedding
    before = table[...]
    moved = np.array(before)
    moved[position] += probes.direction("moved", moved.shape[1:])
    table.set_value(jnp.asarray(moved))
    try:
        yield
    finally:
        table.set_value(before)


@contextlib.contextmanager
def counted_rows(model: Model) -> Iterator[Callable[[], float]]:
    """Count the tokens that go through the linear layers; each layer counts for its share.

    Yields:
        The function that returns the count so far.
    """
    number = sum(isinstance(module, nnx.Linear) for _, module in nnx.iter_modules(model))
    rows: list[float] = []
    call = nnx.Linear.__call__

    def counting(self: nnx.Linear, inputs: jax.Array, **options: object) -> jax.Array:
        # Compiled code calls its layers once, but the callback each time.
        share = inputs.size / inputs.shape[-1] / number
        jax.debug.callback(lambda: rows.append(share))
        return call(self, inputs, **options)

    def so_far() -> float:
        jax.effects_barrier()
        return sum(rows)

    with mock.patch.object(nnx.Linear, "__call__", counting):
        yield so_far
