"""A Flax NNX language model as a patient. Read beside parity/doctor/torch_patient.py.

Dimension key: B batch, T tokens, D embed dim, V vocab.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity.doctor.patient import Patient, Score
from parity.doctor.sizes import find_position_table, find_sizes, logits_of
from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, dotted


def flax_patient(
    module: nnx.Module,
    *,
    name: str = "",
    vocab_size: int | None = None,
    context_length: int | None = None,
    forward: Callable[..., jax.Array] | None = None,
    takes_counts: bool = False,
    objective: Callable[..., jax.Array] | None = None,
    loss: Callable[..., Any] | None = None,
    ignore_index: int | None = None,
    seed: int = 0,
    compiled: bool = True,
    programs: tuple[Callable, Callable] | None = None,
    **offers: Callable[[nnx.Module], Any],
) -> Patient:
    """What can be asked of any NNX module that gives logits for tokens, and what it offers more.

    Args:
        module: left as it is; the patient works on a copy in evaluation mode.
        name: for the report; the class when empty.
        vocab_size: V; looked for in the module's config and first embedding when None.
        context_length: longest sequence; looked for in the module's config when None.
        forward: (module, tokens_BT, counts_B or None) to logits (B, T, V); a call with the tokens
            when None.
        takes_counts: whether `forward` knows padding on the right.
        objective: (module, tokens_BT, counts_B) to the loss it is trained with; the cross entropy
            of the next token when None.
        loss: (logits_BTV, labels_BT, counts_B) to a mean, or to a total and a number of tokens;
            labels are the tokens themselves, since the shift is the loss's own affair.
        ignore_index: a label that the loss does not score.
        seed: of the probes.
        compiled: whether calls go through jax.jit, which pays for all but the smallest models.
        programs: of a patient of the same kind, which are compiled already.
        offers: more fields of `Patient`, each as a function of the module that makes it.

    Raises:
        ValueError: when sizes are not to be found, or the output is not logits.
    """
    options = dict(
        name=name or type(module).__name__, vocab_size=vocab_size, context_length=context_length,
        forward=forward, takes_counts=takes_counts, objective=objective, loss=loss,
        ignore_index=ignore_index, seed=seed, compiled=compiled, **offers,
    )  # fmt: skip
    embeddings = {
        f"{dotted(path)}.embedding": part.num_embeddings
        for path, part in nnx.iter_modules(module)
        if isinstance(part, nnx.Embed)
    }
    vocab_size, context_length = find_sizes(module, vocab_size, context_length, embeddings)
    leaves = flax_leaves(module)
    dtype = next(
        (x.dtype.name for x in leaves.values() if jnp.issubdtype(x.dtype, jnp.floating)), "float32"
    )
    scope = functools.partial(jax_scope, dtype, jax.devices()[0])
    with scope():
        module = _copy(module)
        module.eval()
        graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
    call = forward or (lambda model, tokens, counts: model(tokens))

    def array(x: np.ndarray | None) -> jax.Array | None:
        return None if x is None else jnp.asarray(x, jnp.int32)

    def score_tokens(model: nnx.Module, tokens: jax.Array, counts: Any) -> jax.Array:
        return logits_of(call(model, tokens, counts), tokens.shape, vocab_size)

    def trusted(model: nnx.Module, tokens: jax.Array, counts: Any = None) -> jax.Array:
        return next_token_cross_entropy(score_tokens(model, tokens, counts), tokens, counts)

    def mean_of_own_loss(model: nnx.Module, tokens: jax.Array, counts: Any) -> jax.Array:
        found = loss(score_tokens(model, tokens, counts), tokens, counts)
        return found[0] / found[1] if isinstance(found, tuple) else found

    learn = objective or (mean_of_own_loss if loss else trusted)
    if programs is None:
        programs = _merged(score_tokens), jax.grad(_merged(trusted), argnums=1)
        if compiled:
            programs = tuple(jax.jit(program, static_argnums=0) for program in programs)
    options["programs"] = programs
    run_forward, run_gradient = (
        functools.partial(program, graphdef, parameters, rest) for program in programs
    )

    @contextlib.contextmanager
    def differentiating() -> Iterator[None]:
        # Differentiated one by one, jitted parts would be compiled anew in every call.
        with scope(), contextlib.nullcontext() if compiled else jax.disable_jit():
            yield

    def logits(tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        with scope():
            return np.asarray(run_forward(array(tokens_BT), array(counts_B)))

    def with_weights(leaves: Mapping[str, np.ndarray]) -> Patient:
        with scope():
            changed = _copy(module)
            load_flax(changed, leaves)
        return flax_patient(changed, **options)

    def cast(dtype: str) -> Patient:
        with jax_scope(dtype, jax.devices()[0]):
            return flax_patient(_cast(module, dtype), **options)

    def gradients(
        tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> dict[str, np.ndarray | None]:
        with differentiating():
            found = run_gradient(array(tokens_BT), array(counts_B))
            return {dotted(p): np.asarray(g[...]) for p, g in nnx.to_flat_state(found)}

    def reach(tokens_T: np.ndarray) -> np.ndarray | None:
        with differentiating():
            return _reach(functools.partial(score_tokens, module), array(tokens_T))

    def score(
        logits_BTV: np.ndarray, labels_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> Score:
        with scope():
            found = loss(jnp.asarray(logits_BTV), array(labels_BT), array(counts_B))
            if isinstance(found, tuple):
                total, number = (float(x) for x in found)
                return Score(total / number if number else float("nan"), int(number))
            return Score(float(found))

    def dropout_losses(tokens_BT: np.ndarray) -> tuple[float, float]:
        with scope():
            training = _copy(module)
            training.train()
            first, second = (float(trusted(training, array(tokens_BT))) for _ in range(2))
            return first, second

    drops = any(isinstance(m, nnx.Dropout) and m.rate > 0 for _, m in nnx.iter_modules(module))
    built_in: dict[str, Any] = dict(
        trainer=lambda rate: PlainFlaxTrainer(_copy(module), learn, array, rate, scope),
        dropout_losses=dropout_losses if drops else None,
        cast=cast,
    )
    made = {field: make(module) for field, make in offers.items()}
    return Patient(
        name=options["name"], framework="flax", vocab_size=vocab_size,
        context_length=context_length, dtype=dtype, logits=logits,
        num_params=sum(x.size for x in jax.tree.leaves(parameters)),
        weights=lambda: flax_leaves(module), with_weights=with_weights,
        takes_counts=takes_counts, reach=reach, gradients=gradients,
        position_table=find_position_table(leaves, embeddings, vocab_size),
        score=score if loss else None, ignore_index=ignore_index, seed=seed,
        **(built_in | made),
    )  # fmt: skip


class PlainFlaxTrainer:
    """A plain AdamW, for models that bring no training step of their own."""

    def __init__(
        self, module: nnx.Module, objective: Callable, array: Callable, rate: float, scope: Callable
    ):
        self._module, self._array, self._scope = module, array, scope
        with scope():
            graphdef, self._parameters, self._rest = nnx.split(module, nnx.Param, ...)
            optimizer = optax.adamw(rate, weight_decay=0.0)
            self._state = optimizer.init(self._parameters)

        @jax.jit
        def update(parameters, rest, state, tokens, counts):
            value, gradients = jax.value_and_grad(
                lambda p: objective(nnx.merge(graphdef, p, rest), tokens, counts)
            )(parameters)
            updates, state = optimizer.update(gradients, state, parameters)
            return value, optax.apply_updates(parameters, updates), state

        self._update = update

    def step(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> float:
        """One update; the loss before it."""
        with self._scope():
            value, self._parameters, self._state = self._update(
                self._parameters, self._rest, self._state,
                self._array(tokens_BT), self._array(counts_B),
            )  # fmt: skip
            return float(value)

    def parameters(self) -> Leaves:
        """The present weights."""
        with self._scope():
            nnx.update(self._module, self._parameters)
            return flax_leaves(self._module)


def next_token_cross_entropy(
    logits_BTV: jax.Array, tokens_BT: jax.Array, counts_B: jax.Array | None
) -> jax.Array:
    """The mean over real targets, by the framework's own function."""
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV[:, :-1], tokens_BT[:, 1:]
    )
    if counts_B is None:
        return jnp.mean(losses_BT)
    real_BT = jnp.arange(1, tokens_BT.shape[1])[None, :] < counts_B[:, None]
    return jnp.sum(jnp.where(real_BT, losses_BT, 0.0)) / jnp.sum(real_BT)


def _merged(function: Callable) -> Callable:
    """A function of a module and arrays as one of the module's parts and arrays."""
    return lambda graphdef, parameters, rest, *arrays: function(
        nnx.merge(graphdef, parameters, rest), *arrays
    )


def _reach(
    scores: Callable[[jax.Array, None], jax.Array], tokens_T: jax.Array
) -> np.ndarray | None:
    """By adding zeros to what the token embedding gives, and differentiating by them."""
    T = tokens_T.shape[0]
    tokens_TT = jnp.broadcast_to(tokens_T, (T, T))
    found: list[jax.ShapeDtypeStruct] = []

    def asked(zeros_TTD: jax.Array | None) -> jax.Array:
        def embed(original: Callable, layer: nnx.Embed, inputs: jax.Array) -> jax.Array:
            output = original(layer, inputs)
            traced = isinstance(inputs, jax.core.Tracer)  # inside the model's own jit
            if traced or inputs.shape != tokens_TT.shape or bool(jnp.any(inputs != tokens_TT)):
                return output
            found.append(jax.ShapeDtypeStruct(output.shape, output.dtype))
            return output if zeros_TTD is None else output + zeros_TTD

        with _embedding_through(embed):
            logits_TTV = scores(tokens_TT, None)
        direction_V = jnp.asarray(
            np.random.default_rng(0).normal(size=logits_TTV.shape[-1]), logits_TTV.dtype
        )
        # Row t of a batch of copies asks for position t, so one backward pass answers for them all.
        rows = jnp.arange(T)
        return jnp.sum(logits_TTV[rows, rows] * direction_V[None, :])

    asked(None)
    if not found:
        return None
    gradient_TTD = jax.grad(asked)(jnp.zeros(found[0].shape, found[0].dtype))
    return np.asarray(jnp.linalg.norm(gradient_TTD, axis=-1))


@contextlib.contextmanager
def _embedding_through(embed: Callable) -> Iterator[None]:
    """Replaces the call of every nnx.Embed, and puts it back whatever happens."""
    original = nnx.Embed.__call__
    nnx.Embed.__call__ = lambda layer, inputs, *rest, **more: embed(original, layer, inputs)
    try:
        yield
    finally:
        nnx.Embed.__call__ = original


def _copy(module: nnx.Module) -> nnx.Module:
    """The same module with arrays of its own."""
    return nnx.merge(*jax.tree.map(lambda x: x, nnx.split(module)))


def _cast(module: nnx.Module, dtype: str) -> nnx.Module:
    """The module with every float in another type, its embeddings' compute dtype too."""
    graphdef, state = nnx.split(module)
    state = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    module = nnx.merge(graphdef, state)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Embed):  # computes in the type it was made with
            part.dtype = jnp.dtype(dtype)
    return module
