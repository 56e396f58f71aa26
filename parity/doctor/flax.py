"""A Flax NNX language model under examination. Read beside parity/doctor/torch.py.

Dimension key: B batch, T tokens, D embed dim, V vocab.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Generator, Mapping
from typing import Self, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity.doctor.model import Array, Counts, LanguageModel, Loss, Output, Score
from parity.doctor.offers import NoGradient
from parity.doctor.probes import without_padding
from parity.doctor.sizes import (
    PROBE_BT,
    Lookups,
    Options,
    identify,
    is_recurrent,
    logits_of,
    positions_of,
)
from parity.frameworks.capture import leaves_of
from parity.frameworks.default_call import projection
from parity.frameworks.flax.capture import wrapped_calls
from parity.frameworks.flax.leaves import cast_flax, flax_leaves, load_flax, state_leaves
from parity.frameworks.flax.module import FlaxTrainer, Program, compile_step
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, dotted
from parity.frameworks.protocols import Trainer
from parity.frameworks.scoped import Scoped


class FlaxModel(LanguageModel):
    """An NNX module that returns logits for tokens; see `TorchModel`."""

    framework = "flax"
    compiled = True  # calls go through jax.jit, which pays for all but the smallest models

    def __init__(self, module: nnx.Module, **options: Unpack[Options]):
        tables = {f"{x}.embedding": y.num_embeddings for x, y in _embeddings(module).items()}
        self.given_loss = options.get("loss")
        identify(self, module, options, tables)
        programs = _of_parts(self._logits), jax.grad(_of_parts(self._cross_entropy), argnums=1)
        if self.compiled:
            programs = tuple(jax.jit(program, static_argnums=0) for program in programs)
        self._run_forward, self._run_gradient = programs
        self._steps: dict[float, tuple[Program, optax.GradientTransformation]] = {}
        self._hold(nnx.clone(module))

    def forward(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None
    ) -> Output:
        """Return logits (B, T, V), alone, first in a tuple, or as `logits`."""
        return module(tokens_BT)

    def loss(self, logits_BTV: jax.Array, labels_BT: jax.Array, counts_B: jax.Array | None) -> Loss:
        """Return the model's own loss, a mean or a total and a number; None if it has none."""
        return self.given_loss and self.given_loss(logits_BTV, labels_BT, counts_B)

    def objective(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None = None
    ) -> jax.Array:
        """Return the loss to train with: the model's own, else the next token's cross entropy."""
        logits_BTV = self._logits(module, tokens_BT, counts_B)
        loss = self.loss(logits_BTV, tokens_BT, counts_B)
        if loss is None:
            return next_token_cross_entropy(logits_BTV, tokens_BT, counts_B)
        return loss[0] / loss[1] if isinstance(loss, tuple) else loss

    @functools.cached_property
    def position_table(self) -> str | None:
        """Name of the leaf with a row per position, if there is one."""
        parameters = state_leaves(nnx.state(self.module, nnx.Param))
        return positions_of((x for x, leaf in parameters.items() if leaf.ndim >= 2), self._lookups)

    def tables(self) -> frozenset[str]:
        """Return names of the weights of embedding layers."""
        return frozenset(f"{name}.embedding" for name in _embeddings(self.module))

    def trained_names(self) -> frozenset[str]:
        """Return names of the parameters, which training changes, and of running statistics."""
        return frozenset(state_leaves(nnx.state(self.module, (nnx.Param, nnx.BatchStat))))

    def is_recurrent(self) -> bool:
        """Return whether layers of it read a sequence step by step, with a state."""
        return any(is_recurrent(part) for _, part in nnx.iter_modules(self.module))

    @property
    def dtype(self) -> str:
        """Name of the type of its weights."""
        dtypes = (x.dtype for x in jax.tree.leaves(self._parts[1:]))
        return next((x.name for x in dtypes if jnp.issubdtype(x, jnp.floating)), "float32")

    @property
    def num_params(self) -> int:
        """Number of its parameters, tied ones once."""
        return sum(x.size for x in jax.tree.leaves(self._parts[1]))

    def logits(self, tokens_BT: Array, counts_B: Counts = None) -> Array:
        """Return logits (B, T, V)."""
        with self.scope():
            inputs = self.inputs(tokens_BT, counts_B)
            return np.asarray(self._run_forward(*self._parts, *inputs))

    def weights(self) -> Leaves:
        """Return its leaves by name."""
        return flax_leaves(self.module)

    def with_weights(self, leaves: Mapping[str, Array]) -> Self:
        """Return the same model with other leaves; what is compiled stays so."""
        with self.scope():
            module = nnx.clone(self.module)
            load_flax(module, leaves)
        return self.with_module(module)

    def with_module(self, module: nnx.Module) -> Self:
        """Return the same model around another module, which it keeps."""
        other = copy.copy(self)
        other._hold(module)
        return other

    @functools.cached_property
    def _lookups(self) -> Lookups:
        """What each embedding layer was called with; nothing where the model's own jit calls it."""
        embeddings, lookups = _embeddings(self.module), Lookups()

        def note(path: str, call: Callable[..., Output], args: tuple, kwargs: dict) -> Output:
            if path in embeddings:
                ids = next(leaves_of((args, kwargs)), None)
                known = not isinstance(ids, jax.core.Tracer) and isinstance(ids, Array | jax.Array)
                lookups.setdefault(f"{path}.embedding", []).append(
                    np.asarray(ids) if known else None
                )
            return call(*args, **kwargs)

        with self.scope(), wrapped_calls(self.module, note):
            self._logits(self.module, *self.inputs(without_padding(self, PROBE_BT)))
        return lookups

    def cast(self, dtype: str) -> Self:
        """Return the same model in another type."""
        with jax_scope(dtype, jax.devices()[0]):
            return self.with_module(cast_flax(self.module, dtype))

    def score(self, logits_BTV: Array, labels_BT: Array, counts_B: Counts = None) -> Score | None:
        """Return its own loss of these logits; None for a model without one."""
        with self.scope():
            loss = self.loss(jnp.asarray(logits_BTV), *self.inputs(labels_BT, counts_B))
            return None if loss is None else Score.of(loss)

    def gradients(self, tokens_BT: Array, counts_B: Counts = None) -> Leaves:
        """Return the gradient of the mean next-token loss by parameter, zeros where it has none."""
        with self._differentiating():
            inputs = self.inputs(tokens_BT, counts_B)
            return state_leaves(self._run_gradient(*self._parts, *inputs))

    def trainer(self, rate: float) -> Trainer:
        """Start a training of a copy by AdamW."""

        def loss(module: nnx.Module, tokens: jax.Array, *counts: jax.Array) -> jax.Array:
            module.eval()  # as it is examined
            return self.objective(module, tokens, *counts)

        with self.scope():
            if rate not in self._steps:  # one program for all trainings at a rate
                optimizer = optax.adamw(rate, weight_decay=0.0)
                self._steps[rate] = compile_step(loss, optimizer), optimizer
            step, optimizer = self._steps[rate]
            trainer = FlaxTrainer(nnx.clone(self.module), step, optimizer)
            return cast(Trainer, Scoped(trainer, self.scope))

    def dropout_losses(self, tokens_BT: Array) -> tuple[float, float] | None:
        """Return the losses of two forward passes in training mode; None without dropout."""
        parts = (part for _, part in nnx.iter_modules(self.module))
        if not any(isinstance(part, nnx.Dropout) and part.rate > 0 for part in parts):
            return None
        with self.scope():
            module, tokens = nnx.clone(self.module), self.ids(tokens_BT)
            module.train()
            first, second = (float(self._cross_entropy(module, tokens)) for _ in range(2))
        return first, second

    def reach(self, tokens_T: Array) -> Array | None:
        """Return (T, T): the norm of the gradient of the logits at t by the embedding of token s.

        Zeros are added to what an embedding layer returns for the tokens, and the logits derived
        by them. None where no layer is called with the tokens themselves.
        """
        T = len(tokens_T)
        tokens_TT = np.broadcast_to(tokens_T, (T, T))
        embeddings, shapes = _embeddings(self.module), []

        def asked(zeros_TTD: jax.Array | None) -> jax.Array:
            def add_zeros(
                path: str, call: Callable[..., Output], args: tuple, kwargs: dict
            ) -> Output:
                output = call(*args, **kwargs)
                if path not in embeddings or not is_asked(next(leaves_of((args, kwargs)))):
                    return output
                shapes.append((output.shape, output.dtype))
                return output if zeros_TTD is None else output + zeros_TTD

            with wrapped_calls(self.module, add_zeros):
                logits_TTV = self._logits(self.module, self.ids(tokens_TT), None)
            # Row t of a batch of copies asks for position t: one backward pass answers for all.
            weights_V = jnp.asarray(projection(self.vocab_size), logits_TTV.dtype)
            return jnp.sum(logits_TTV[np.arange(T), np.arange(T)] @ weights_V)

        def is_asked(ids: object) -> bool:  # not where the model's own jit traces them
            concrete = isinstance(ids, jax.Array) and not isinstance(ids, jax.core.Tracer)
            return concrete and np.array_equal(ids, tokens_TT)

        with self._differentiating():
            asked(None)
            if not shapes:
                return None
            gradient_TTD = jax.grad(asked)(jnp.zeros(*shapes[0]))
            reach_TT = np.asarray(jnp.linalg.norm(gradient_TTD, axis=-1))
            if not np.any(reach_TT):
                raise NoGradient
            return reach_TT

    def ids(self, array: Array) -> jax.Array:
        """Return token ids or counts as an array of jax."""
        return jnp.asarray(array, jnp.int32)

    def inputs(
        self, tokens_BT: Array, counts_B: Counts = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return token ids and counts as arrays of jax."""
        return self.ids(tokens_BT), None if counts_B is None else self.ids(counts_B)

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of its calls, with 64-bit types exactly when it has them."""
        return jax_scope(self.dtype, jax.devices()[0])

    @contextlib.contextmanager
    def _differentiating(self) -> Generator[None]:
        # Differentiated one by one, jitted parts would be compiled anew in every call.
        with self.scope(), contextlib.nullcontext() if self.compiled else jax.disable_jit():
            yield

    def _hold(self, module: nnx.Module) -> None:
        module.eval()
        self.module, self._parts = module, nnx.split(module, nnx.Param, ...)

    def _logits(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None
    ) -> jax.Array:
        output = self.forward(module, tokens_BT, counts_B)
        return logits_of(output, tokens_BT.shape, self.vocab_size)

    def _cross_entropy(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None = None
    ) -> jax.Array:
        logits_BTV = self._logits(module, tokens_BT, counts_B)
        return next_token_cross_entropy(logits_BTV, tokens_BT, counts_B)


def next_token_cross_entropy(
    logits_BTV: jax.Array, tokens_BT: jax.Array, counts_B: jax.Array | None
) -> jax.Array:
    """Return the mean over real targets, by the framework's own function."""
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV[:, :-1], tokens_BT[:, 1:]
    )
    if counts_B is None:
        return jnp.mean(losses_BT)
    real_BT = jnp.arange(1, tokens_BT.shape[1])[None, :] < counts_B[:, None]
    return jnp.sum(jnp.where(real_BT, losses_BT, 0.0)) / jnp.sum(real_BT)


def _embeddings(module: nnx.Module) -> dict[str, nnx.Embed]:
    parts = nnx.iter_modules(module)
    return {dotted(path): part for path, part in parts if isinstance(part, nnx.Embed)}


def _of_parts(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Turn a function of a module and arrays into one of the module's parts and arrays."""
    return lambda graphdef, parameters, rest, *arrays: function(
        nnx.merge(graphdef, parameters, rest), *arrays
    )
