"""What the grader has a Flax starter do, stage by stage. Read beside torch_stages.py.

A stage gives plain numbers by name. Modules have a starter's files as attributes: model, cache,
train, generate.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import probes

FRAMEWORK = "flax"


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Everything in float64."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        yield


def array(x: Any) -> np.ndarray:
    """Any array on the host."""
    return np.asarray(x)


def ids(tokens: np.ndarray) -> jax.Array:
    """Tokens as the framework takes them."""
    return jnp.asarray(tokens, jnp.int32)


def build(modules: Any) -> Any:
    """The starter's model with the grader's weights."""
    model = modules.model.GPT(modules.model.Config(**probes.SIZES), seed=0)
    leaves(model)
    wanted = probes.to_native(probes.weights(), FRAMEWORK)
    for name, variable in _variables(model).items():
        variable.set_value(jnp.asarray(wanted[name]))
    return model


def leaves(model: Any, sizes: Mapping[str, int] = probes.SIZES) -> probes.Leaves:
    """The model's parameters."""
    found = {name: np.array(variable[...]) for name, variable in _variables(model).items()}
    return probes.from_native(found, FRAMEWORK, sizes)


def _variables(model: Any) -> dict[str, nnx.Variable]:
    """Parameters by name, and what has a parameter's name without being one."""
    names = probes.to_native(probes.weights(), FRAMEWORK)
    found = {_dotted(path): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    return {
        name: variable
        for name, variable in found.items()
        if name in names or isinstance(variable, nnx.Param)
    }


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def initial_weights(modules: Any, reference: Any) -> dict[str, Any]:
    """Mean and deviation of everything that a new model holds."""
    model = modules.model.GPT(modules.model.Config(**probes.START_SIZES), seed=3)
    return probes.spread(leaves(model, probes.START_SIZES))


def forward_pass(modules: Any, reference: Any) -> dict[str, Any]:
    """Logits of several lengths, and the gradient by every parameter."""
    model = build(modules)
    read, found = reader(model), {}
    for rows, width in ((1, 13), (2, 1)):
        found[f"logits of {rows} x {width} tokens"] = read(probes.tokens(rows, width, 0)).tolist()
    logits_BTV, gradients = _logits_and_gradients(model, probes.tokens(3, 7, 0))
    found["logits of 3 x 7 tokens"] = logits_BTV.tolist()
    digests = probes.digest(gradients)
    return found | {f"gradient of {name}": numbers for name, numbers in digests.items()}


def _logits_and_gradients(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, probes.Leaves]:
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def differentiated(parameters: nnx.State) -> Any:
        def weighed(parameters: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits_BTV = logits_of(nnx.merge(graph, parameters, rest)(ids(tokens)))
            return (logits_BTV * probes.direction("logits", logits_BTV.shape)).sum(), logits_BTV

        return jax.grad(weighed, has_aux=True)(parameters)

    by_path, logits_BTV = differentiated(parameters)
    variables = _variables(model)
    gradients = {name: np.zeros(variable[...].shape) for name, variable in variables.items()}
    gradients |= {_dotted(p): np.array(gradient[...]) for p, gradient in nnx.to_flat_state(by_path)}
    return array(logits_BTV), probes.from_native(gradients, FRAMEWORK)


def loss(modules: Any, reference: Any) -> dict[str, Any]:
    """The loss of given logits, and its gradient by them."""
    tokens_BT = ids(probes.tokens(3, 7, 0))

    @jax.jit
    def differentiated(logits_BTV: jax.Array) -> Any:
        return jax.value_and_grad(modules.train.next_token_loss)(logits_BTV, tokens_BT)

    value, gradient_BTV = differentiated(jnp.asarray(probes.logits(3, 7, 0)))
    return {"loss": value.item(), "gradient of the logits": array(gradient_BTV).tolist()}


def training(modules: Any, reference: Any) -> dict[str, Any]:
    """A few steps of the starter's loop on a right model with a right loss."""
    own = modules.train.next_token_loss
    modules.train.next_token_loss = reference.train.next_token_loss
    try:
        return _trained(modules, build(reference))
    finally:
        modules.train.next_token_loss = own


def together(modules: Any, reference: Any) -> dict[str, Any]:
    """The same with the starter's own model and loss."""
    return _trained(modules, build(modules))


def _trained(modules: Any, model: Any) -> dict[str, Any]:
    losses = modules.train.train(
        model, ids(probes.tokens(3, 7, 0)), probes.NUM_STEPS, probes.LEARNING_RATE
    )
    digests = probes.digest(leaves(model))
    found = {f"{name} after training": numbers for name, numbers in digests.items()}
    return {"losses": [float(x) for x in losses]} | found


def generation(modules: Any, reference: Any) -> dict[str, Any]:
    """Tokens that the starter's loop has a right model choose."""
    model = build(reference)
    return {
        f"{number} tokens behind {tokens.shape[0]} x {tokens.shape[1]}": array(
            modules.generate.generate(model, ids(tokens), number)
        ).tolist()
        for tokens, number in probes.PROMPTS
    }


def logits_of(found: Any) -> jax.Array:
    """What a model gave, without the cache that it may have given too."""
    return found[0] if isinstance(found, tuple) else found


def reader(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Tokens to logits, compiled for each shape."""
    graph, state = nnx.split(model)

    @jax.jit
    def compiled(state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
        return logits_of(nnx.merge(graph, state)(tokens_BT))

    return lambda tokens: array(compiled(state, ids(tokens)))


def read_on(model: Any, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
    """Logits, and the cache with the tokens in it."""
    logits_BTV, cache = model(ids(tokens), cache)
    return array(logits_BTV), cache


@contextlib.contextmanager
def moved_position(model: Any, position: int) -> Iterator[None]:
    """The model with another vector at one position."""
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
def counted_rows(model: Any) -> Iterator[Callable[[], float]]:
    """Yields the function that says how many tokens went through the linear layers so far.

    Each layer counts for its share of all of them.
    """
    number = sum(isinstance(module, nnx.Linear) for _, module in nnx.iter_modules(model))
    rows: list[float] = []
    call = nnx.Linear.__call__

    def counting(self: nnx.Linear, x: jax.Array, **options: Any) -> jax.Array:
        # What is compiled calls its layers once, but the callback each time.
        share = x.size / x.shape[-1] / number
        jax.debug.callback(lambda: rows.append(share))
        return call(self, x, **options)

    def so_far() -> float:
        jax.effects_barrier()
        return sum(rows)

    nnx.Linear.__call__ = counting
    try:
        yield so_far
    finally:
        nnx.Linear.__call__ = call
