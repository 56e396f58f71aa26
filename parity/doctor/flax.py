"""A Flax NNX language model under examination. Read beside parity/doctor/torch.py.

Dimension key: B batch, T tokens, D embed dim, V vocab.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity.doctor.model import LanguageModel, Score, Trainer
from parity.doctor.sizes import find_position_table, find_sizes, logits_of
from parity.frameworks.capture import leaves_of
from parity.frameworks.flax.capture import wrapped_calls as wrapped_calls
from parity.frameworks.flax.leaves import flax_leaves, load_flax, state_leaves
from parity.frameworks.flax.module import FlaxTrainer, compile_step
from parity.frameworks.flax.purity import flax_in
from parity.frameworks.flax.scope import Scoped, jax_scope
from parity.frameworks.leaves import Leaves, dotted


class FlaxModel(LanguageModel):
    """Any NNX module that returns logits for tokens.

    A subclass says what is different about its module: how it is called (`forward`,
    `takes_counts`), what it is scored by and trained with (`loss`, `objective`), and what more it
    offers, by the methods of the protocols in parity/doctor/model.py.

    Args:
        module: left as it is; a copy of it in evaluation mode is examined.
        name: for the report; the class when empty.
        vocab_size: V; looked for in the module's config and first embedding when None.
        context_length: longest sequence; looked for in the module's config when None.
        loss: (logits_BTV, labels_BT, counts_B) to a mean, or to a total and a number of tokens;
            labels are the tokens themselves, since the loss shifts. None for the class's.
        ignore_index: a label that the loss does not score; None for the class's.
        seed: of the probes.
        trained: whether the weights are trained.

    Raises:
        ValueError: when sizes are not to be found.
    """

    framework = "flax"
    loss: Callable[..., Any] | None = None
    compiled = True  # calls go through jax.jit, which pays for all but the smallest models

    def __init__(
        self,
        module: nnx.Module,
        *,
        name: str = "",
        vocab_size: int | None = None,
        context_length: int | None = None,
        loss: Callable[..., Any] | None = None,
        ignore_index: int | None = None,
        seed: int = 0,
        trained: bool = False,
    ):
        embeddings = {
            f"{dotted(path)}.embedding": part.num_embeddings
            for path, part in nnx.iter_modules(module)
            if isinstance(part, nnx.Embed)
        }
        self.name, self.seed, self.trained = name or type(module).__name__, seed, trained
        sizes = find_sizes(module, vocab_size, context_length, embeddings)
        self.vocab_size, self.context_length = sizes
        leaves = flax_leaves(module)
        self.position_table = find_position_table(leaves, embeddings, self.vocab_size)
        if loss is not None:
            self.loss = loss
        if ignore_index is not None:
            self.ignore_index = ignore_index
        programs = _of_parts(self._logits), jax.grad(_of_parts(self._cross_entropy), argnums=1)
        if self.compiled:
            programs = tuple(jax.jit(program, static_argnums=0) for program in programs)
        self._run_forward, self._run_gradient = programs
        self._hold(nnx.clone(module))

    def forward(self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None) -> Any:
        """Return logits (B, T, V), alone, first in a tuple, or as `logits`."""
        return module(tokens_BT)

    def objective(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None = None
    ) -> jax.Array:
        """Return the loss to train with: the model's own, else the next token's cross entropy."""
        if self.loss is None:
            return self._cross_entropy(module, tokens_BT, counts_B)
        loss = self.loss(self._logits(module, tokens_BT, counts_B), tokens_BT, counts_B)
        return loss[0] / loss[1] if isinstance(loss, tuple) else loss

    @property
    def dtype(self) -> str:
        """Name of the type of its weights."""
        dtypes = (x.dtype for x in jax.tree.leaves(self._parts[1:]))
        return next((x.name for x in dtypes if jnp.issubdtype(x, jnp.floating)), "float32")

    @property
    def num_params(self) -> int:
        """Number of its parameters, tied ones once."""
        return sum(x.size for x in jax.tree.leaves(self._parts[1]))

    def logits(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        """Return logits (B, T, V)."""
        with self.scope():
            return np.asarray(
                self._run_forward(*self._parts, self.ids(tokens_BT), self.ids(counts_B))
            )

    def weights(self) -> Leaves:
        """Return its leaves by name."""
        return flax_leaves(self.module)

    def with_weights(self, leaves: Mapping[str, np.ndarray]) -> Self:
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

    def cast(self, dtype: str) -> Self:
        """Return the same model in another type."""
        with jax_scope(dtype, jax.devices()[0]):
            return self.with_module(flax_in(self.module, dtype))

    def score(
        self, logits_BTV: np.ndarray, labels_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> Score | None:
        """Return its own loss of these logits; None for a model without one."""
        if self.loss is None:
            return None
        with self.scope():
            scores = jnp.asarray(logits_BTV)
            return Score.of(self.loss(scores, self.ids(labels_BT), self.ids(counts_B)))

    def gradients(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> Leaves:
        """Return the gradient of the mean next-token loss by parameter, zeros where it has none."""
        with self.op_by_op():
            found = self._run_gradient(*self._parts, self.ids(tokens_BT), self.ids(counts_B))
            return state_leaves(found)

    def trainer(self, rate: float) -> Trainer:
        """Start a training of a copy by AdamW."""

        def loss(module: nnx.Module, tokens: jax.Array, *counts: jax.Array) -> jax.Array:
            module.eval()  # as it is examined
            return self.objective(module, tokens, *counts)

        optimizer = optax.adamw(rate, weight_decay=0.0)
        with self.scope():
            program = compile_step(loss, optimizer)
            return Scoped(FlaxTrainer(nnx.clone(self.module), program, optimizer), self.scope)

    def dropout_losses(self, tokens_BT: np.ndarray) -> tuple[float, float] | None:
        """Return the losses of two forward passes in training mode; None without dropout."""
        parts = (part for _, part in nnx.iter_modules(self.module))
        if not any(isinstance(part, nnx.Dropout) and part.rate > 0 for part in parts):
            return None
        with self.scope():
            training = nnx.clone(self.module)
            training.train()
            first, second = (
                float(self._cross_entropy(training, self.ids(tokens_BT), None)) for _ in range(2)
            )
        return first, second

    def reach(self, tokens_T: np.ndarray) -> np.ndarray | None:
        """Return (T, T): the gradient of the logits at t by the embedding of token s, its norm.

        Zeros are added to what the embedding layer returns, and the logits derived by them. None
        where no embedding layer is called with the tokens themselves.
        """
        T = len(tokens_T)
        embeddings = {
            dotted(path)
            for path, part in nnx.iter_modules(self.module)
            if isinstance(part, nnx.Embed)
        }
        shapes: list[jax.ShapeDtypeStruct] = []

        def asked(zeros_TTD: jax.Array | None) -> jax.Array:
            def around(path: str, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
                output = call(*args, **kwargs)
                if path not in embeddings or not _is_equal(next(leaves_of((args, kwargs)))):
                    return output
                shapes.append(jax.ShapeDtypeStruct(output.shape, output.dtype))
                return output if zeros_TTD is None else output + zeros_TTD

            with wrapped_calls(self.module, around):
                logits_TTV = self._logits(self.module, tokens_TT, None)
            direction_V = np.random.default_rng(0).normal(size=logits_TTV.shape[-1])
            # Row t of a batch of copies asks for position t: one backward pass answers for all.
            rows = jnp.arange(T)
            direction_V = jnp.asarray(direction_V, logits_TTV.dtype)
            return jnp.sum(logits_TTV[rows, rows] * direction_V[None])

        def _is_equal(inputs: jax.Array) -> bool:
            traced = isinstance(inputs, jax.core.Tracer)  # inside the model's own jit
            return not traced and inputs.shape == (T, T) and bool(jnp.all(inputs == tokens_TT))

        with self.op_by_op():
            tokens_TT = jnp.broadcast_to(self.ids(tokens_T), (T, T))
            asked(None)
            if not shapes:
                return None
            gradient_TTD = jax.grad(asked)(jnp.zeros(shapes[0].shape, shapes[0].dtype))
            return np.asarray(jnp.linalg.norm(gradient_TTD, axis=-1))

    def ids(self, array: np.ndarray | None) -> jax.Array | None:
        """Return token ids or counts as an array of jax."""
        return None if array is None else jnp.asarray(array, jnp.int32)

    def scope(self) -> AbstractContextManager:
        """Return the context of its calls, with 64-bit types exactly when it has them."""
        return jax_scope(self.dtype, jax.devices()[0])

    @contextlib.contextmanager
    def op_by_op(self) -> Iterator[None]:
        """Run a model that is not compiled operation by operation.

        When it is differentiated, its jitted parts would be compiled anew in every call.
        """
        with self.scope(), contextlib.nullcontext() if self.compiled else jax.disable_jit():
            yield

    def _hold(self, module: nnx.Module) -> None:
        module.eval()
        self.module = module
        self._parts = nnx.split(module, nnx.Param, ...)

    def _logits(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None
    ) -> jax.Array:
        output = self.forward(module, tokens_BT, counts_B)
        return logits_of(output, tokens_BT.shape, self.vocab_size)

    def _cross_entropy(
        self, module: nnx.Module, tokens_BT: jax.Array, counts_B: jax.Array | None
    ) -> jax.Array:
        """Return the mean over real targets, by the framework's own function."""
        logits_BTV = self._logits(module, tokens_BT, counts_B)
        losses_BT = optax.softmax_cross_entropy_with_integer_labels(
            logits_BTV[:, :-1], tokens_BT[:, 1:]
        )
        if counts_B is None:
            return jnp.mean(losses_BT)
        real_BT = jnp.arange(1, tokens_BT.shape[1])[None, :] < counts_B[:, None]
        return jnp.sum(jnp.where(real_BT, losses_BT, 0.0)) / jnp.sum(real_BT)


def _of_parts(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Turn a function of a module and arrays into one of the module's parts and arrays."""
    return lambda graphdef, parameters, rest, *arrays: function(
        nnx.merge(graphdef, parameters, rest), *arrays
    )
