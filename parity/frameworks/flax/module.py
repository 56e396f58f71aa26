"""A Flax NNX module as a `ModelSpec`: how it is called, scored and trained.

A `parity.frameworks.handle.Handle`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jax.interpreters.partial_eval import dce_jaxpr

from parity.frameworks import default_call
from parity.frameworks.batch import Argument, Batch, Outputs
from parity.frameworks.flax.calls import Arguments, arguments, returning_leaves
from parity.frameworks.flax.leaves import StaticCasts, cast_flax, flax_leaves, state_leaves
from parity.frameworks.flax.runner import FlaxRunner, FlaxSpec, conjugated, is_trained
from parity.frameworks.flax.scope import jax_scope, lowered
from parity.frameworks.leaves import Arrays, Leaves, dotted
from parity.frameworks.protocols import Moments, NotCompared, Unusable
from parity.frameworks.spec import BY_DEFAULT, ModelSpec, ModuleUse

NAME, MODULE = "flax", nnx.Module

# Under these names optax keeps a mean of gradients, and what it divides by or its square.
_MEANS = ("mu",)
_SQUARES = "nu", "sum_of_squares", "e_g"

Built = TypeVar("Built")
Loss = Callable[..., jax.Array]
FlaxUse = ModuleUse[jax.Array, optax.GradientTransformation]
# (parameters, rest, optimizer state, arguments) to the loss and these three after a step
Step = Callable[..., tuple[jax.Array, nnx.State, nnx.State, optax.OptState]]
Program = Callable[[nnx.GraphDef[nnx.Module]], Step]


def spec(
    module: nnx.Module,
    use: FlaxUse = BY_DEFAULT,
    scored: Sequence[str] | None = None,
    frozen: Collection[str] = (),
) -> FlaxSpec:
    """Return the spec of a Flax NNX module, which is copied for every use and never changed.

    Args:
        module: the module.
        use: how it is called, scored and trained.
        scored: paths of the leaves of its output that the default loss reads, in order; all floats
            in the order of their paths when None.
        frozen: leaves that are not trained, beside those that are no parameters of floats.
    """
    signature = default_call.Signature.of(module, use.call)

    def called(in_training: bool, model: nnx.Module, *inputs: object, **keywords: object) -> object:
        given = signature.arguments(inputs, keywords, in_training, _stream)
        return (use.call or _call)(model, *inputs, **given)

    def projected(
        in_training: bool, model: nnx.Module, *inputs: object, **keywords: object
    ) -> jax.Array:
        returned = returning_leaves(called)(in_training, model, *inputs, **keywords)
        leaves = returned.float_leaves(scored)
        numbers = [jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x for x in leaves]
        output = jnp.concatenate([x.ravel() for x in numbers])
        weights = jnp.asarray(default_call.projection(output.size), output.dtype)
        return jnp.dot(jnp.where(jnp.isfinite(output), output, 0), weights)

    def moves(path: tuple[object, ...], variable: object) -> bool:
        return is_trained(path, variable) and dotted(path) not in frozen

    optimizer = use.optimizer or adamw()
    casts = StaticCasts()
    program = compile_step(use.loss or functools.partial(projected, True), optimizer, moves)
    return ModelSpec(
        name=f"{type(module).__name__} (flax)",
        build=lambda dtype: cast_flax(module, dtype, casts),
        forward=functools.partial(called, False),
        loss=use.loss or functools.partial(projected, False),
        trainer=lambda model, num_steps: FlaxTrainer(model, program, optimizer, moves),
    )


class FlaxTrainer:
    """Training by jax.value_and_grad and optax, in training mode but without dropout.

    `program` is that of `compile_step`, compiled with this optimizer for these variables.
    """

    def __init__(
        self,
        module: nnx.Module,
        program: Program,
        optimizer: optax.GradientTransformation,
        moves: nnx.filterlib.Filter = nnx.Param,
    ):
        module.train()
        # Nothing is dropped, for the frameworks draw masks from different generators.
        for _, submodule in nnx.iter_modules(module):
            if isinstance(submodule, nnx.Dropout):
                submodule.rate = 0.0
            if isinstance(submodule, nnx.MultiHeadAttention):
                submodule.dropout_rate = 0.0
        self._graphdef, self._parameters, self._rest = nnx.split(module, moves, ...)
        self._step, self._state = program(self._graphdef), optimizer.init(self._parameters)
        types = (x.dtype for x in jax.tree.leaves(nnx.state(module)) if isinstance(x, jax.Array))
        floats = (str(jnp.finfo(x).dtype) for x in types if jnp.issubdtype(x, jnp.inexact))
        self._dtype = next(floats, "float32")

    def step(self, *inputs: Argument, **keywords: Argument) -> float:
        """Take one optimizer step and return the loss before it."""
        call = arguments(inputs, keywords, self._dtype)
        try:
            with _nothing_dropped():  # while it is traced
                given = self._parameters, self._rest, self._state, call
                loss, self._parameters, self._rest, self._state = lowered(
                    functools.partial(self._step, *given)
                )
        except TypeError as error:
            if "keyword-only argument" not in str(error):
                raise
            raise NotCompared(
                "the optimizer of optax evaluates the loss itself; only optimizers that take one "
                "gradient a step are compared"
            ) from error
        return float(loss)

    def parameters(self) -> Leaves:
        """Return the present weights and statistics."""
        return flax_leaves(nnx.merge(self._graphdef, self._parameters, self._rest))

    def moments(self) -> Moments:
        """Return the moments of all states in the optimizer that have them."""
        first, second, traces, updates = Leaves(), Leaves(), Leaves(), None
        for state in jax.tree.leaves(self._state, is_leaf=_is_named):
            found = state._asdict() if _is_named(state) else {}
            for moments, keys in ((first, _MEANS), (second, _SQUARES), (traces, ("trace",))):
                for key in keys:
                    if isinstance(found.get(key), nnx.State):
                        moments |= state_leaves(found[key])
            if "count" in found and (first or second):
                updates = max(updates or 0, int(found["count"]))
        # That of RMSprop is a momentum of updates and not of gradients.
        return first or ({} if second else traces), second, updates


def compile_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    moves: nnx.filterlib.Filter = nnx.Param,
) -> Program:
    """Return a training step of some variables for each graph.

    It is compiled once for all trainers of equal graphs.
    """
    # The graph is no argument of what is compiled, for it may hold what has no hash, as configs do.
    compiled: list[tuple[nnx.GraphDef[nnx.Module], Step]] = []

    def program(graphdef: nnx.GraphDef[nnx.Module]) -> Step:
        for known, found in compiled:
            if _are_equal(known, graphdef):
                return found
        compiled.append((graphdef, jax.jit(functools.partial(step, graphdef))))
        return compiled[-1][1]

    def step(graphdef: Any, parameters: Any, rest: Any, state: Any, call: Arguments) -> tuple:
        def scored(parameters: Any) -> tuple[jax.Array, Any]:
            model = nnx.merge(graphdef, parameters, rest, copy=True)  # statistics change in it
            value = loss(model, *call.inputs, **call.keywords)
            return value, nnx.split(model, moves, ...)[2]

        (value, rest), gradients = jax.value_and_grad(scored, has_aux=True)(parameters)
        updates, state = optimizer.update(conjugated(gradients), state, parameters)
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
        def square(g: jax.Array) -> jax.Array:
            # Of real and imaginary parts apart, as torch has it.
            return jax.lax.complex(g.real**2, g.imag**2) if jnp.iscomplexobj(g) else g * g

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            if jnp.iscomplexobj(m):
                return jax.lax.complex(direction(m.real, v.real), direction(m.imag, v.imag))
            # -expm1(n log b) is 1 - b**n without the cancellation.
            steps = count.astype(m.dtype)
            m_hat = m / -jnp.expm1(steps * math.log(beta1))
            v_hat = v / -jnp.expm1(steps * math.log(beta2))
            return m_hat / (jnp.sqrt(v_hat) + default_call.EPSILON)

        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * square(g), state.nu, updates)
        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(default_call.WEIGHT_DECAY),
        optax.scale_by_learning_rate(default_call.LEARNING_RATE),
    )


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Return what a function builds; Flax draws from streams of the user's own."""
    return build()


def prepared(module: nnx.Module, use: FlaxUse, batch: Batch) -> nnx.Module:
    """Return a module that can be checked: its linen parts, which are lazy, have variables."""
    if not any(map(_is_empty_bridge, dict(nnx.iter_modules(module)).values())):
        return module
    module = nnx.clone(module)
    call = arguments(batch.inputs, batch.keywords, "float32")
    for _, part in nnx.iter_modules(module):
        if _is_empty_bridge(part):
            part._pytree__state._initializing = True
    spec(module, use).forward(module, *call.inputs, **call.keywords)
    for _, part in nnx.iter_modules(module):
        part._pytree__state._initializing = False
    return module


def _is_empty_bridge(module: nnx.Module) -> bool:
    names = (name for name in vars(module) if not name.startswith(("_pytree__", "to_nnx__")))
    return isinstance(module, nnx.bridge.ToNNX) and not any(names)


def tried(spec: FlaxSpec, batch: Batch) -> tuple[Outputs, set[str]]:
    """Return an output of the shapes and types of a model's, and the paths of its own arrays.

    Raises:
        Unusable: for a model whose outputs are random.
    """
    with jax_scope("float32", jax.devices("cpu")[0]):
        model = spec.build("float32")
        model.eval()
        call = arguments(batch.inputs, batch.keywords, "float32")
        graphdef, streams, state = nnx.split(model, nnx.RngState, ...)

        def forward(streams: nnx.State, state: nnx.State, call: Arguments) -> object:
            return spec.forward(
                nnx.merge(graphdef, streams, state, copy=True), *call.inputs, **call.keywords
            )

        try:
            jaxpr, returned = jax.make_jaxpr(returning_leaves(forward), return_shape=True)(
                streams, state, call
            )
        except jax.errors.JAXTypeError:  # it looks at numbers
            returned = returning_leaves(forward)(streams, state, call)
        else:
            _, used = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
            if any(used[: len(jax.tree.leaves(streams))]):
                raise Unusable(
                    "its outputs depend on its random streams. What is compared must be a "
                    "function. Turn dropout and the like off in evaluation"
                )
        return returned.outputs(), set(returned.derived)


@contextlib.contextmanager
def _nothing_dropped() -> Iterator[None]:
    """Let linen's dropout, whose rate is fixed, drop nothing."""
    original = linen.Dropout.__call__
    linen.Dropout.__call__ = lambda self, inputs, *args, **kwargs: inputs
    try:
        yield
    finally:
        linen.Dropout.__call__ = original


def _stream(name: str) -> object:
    return nnx.Rngs(0) if name == "rngs" else jax.random.key(0)


def _call(module: Callable[..., object], *inputs: object, **keywords: object) -> object:
    return module(*inputs, **keywords)


def initial_leaves(spec: FlaxSpec, dtype: str) -> Leaves:
    """Return the weights that a model is built with, on the CPU."""
    with jax_scope(dtype, jax.devices("cpu")[0]):
        return flax_leaves(spec.build(dtype))


def trained(module: nnx.Module) -> set[str]:
    """Return the names of the leaves that training moves by their gradient."""
    return set(state_leaves(nnx.state(module, is_trained)))


def code_leaves(module: nnx.Module) -> tuple[str, ...]:
    """Return no names: what a Flax module holds is its weights."""
    return ()


def runner(spec: FlaxSpec, weights: Arrays) -> FlaxRunner:
    """Return a runner in lifted float64 on the CPU."""
    return FlaxRunner(spec, weights, "float64", jax.devices("cpu")[0], lift=True)


def learning_rate(module: nnx.Module, optimizer: optax.GradientTransformation | None) -> float:
    """Return the default learning rate; an optimizer of the user's does not reveal its own."""
    if optimizer is not None:
        raise ValueError(
            "record: an optimizer of optax does not tell its learning rate. Single updates are "
            "judged in learning rates. Give learning_rate."
        )
    return default_call.LEARNING_RATE


def _is_named(state: object) -> bool:
    """Whether this is the state of a transformation that keeps moments."""
    names = getattr(state, "_fields", ())
    return not {*_MEANS, *_SQUARES, "trace"}.isdisjoint(names)
