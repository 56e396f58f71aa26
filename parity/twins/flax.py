"""The handle of flax_gpt: built, trained, decoded and observed in NumPy. Its twin is torch.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_gpt
from parity.frameworks.flax.donation import donated
from parity.frameworks.flax.leaves import flax_leaves, load_flax, state_leaves
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, dotted
from parity.system.memory import is_large
from parity.twins.state import (
    fitting,
    leaves_under,
    named_state,
    require_same_state,
)
from parity.twins.twin import Constants, Inputs, Twin, task_of

if TYPE_CHECKING:
    from parity.twins.twin import Config


Result = TypeVar("Result")


class FlaxTwin(Twin):
    """flax_gpt with weights, a dtype and a device; see `Twin`.

    Args:
        model: a GPT, or a classifier around one.
        package: flax_gpt, or the changed copy of it that the model is of.
        compiled: whether the model runs as one program; operation by operation otherwise, so that
            what was compiled for one copy of the package serves all others.
    """

    name = "flax_gpt"
    framework = "flax"
    original = flax_gpt

    def __init__(
        self, model: flax_gpt.GPT, package: ModuleType | None = None, compiled: bool = True
    ):
        self.model, self.compiled = model, compiled
        self.package: ModuleType = package or flax_gpt
        leaf = jax.tree.leaves(nnx.state(model))[0]
        self.dtype, self.device = str(leaf.dtype), next(iter(leaf.devices()))

    @classmethod
    def build(
        cls,
        config: Config,
        device: jax.Device | None = None,
        *,
        seed: int | None = None,
        leaves: Iterable[tuple[str, np.ndarray]] | None = None,
        package: ModuleType | None = None,
    ) -> FlaxTwin:
        """See `Twin`."""
        package = package or flax_gpt
        with jax_scope(config.dtype, device or jax.devices("cpu")[0]):
            config = package.GPTConfig(**dataclasses.asdict(config))
            if leaves is None:
                key = None if seed is None else package.random.key(seed)
                return cls(package.GPT(config, key), package)
            model = nnx.eval_shape(lambda: package.GPT(config))
            variables = {dotted(path): x for path, x in nnx.to_flat_state(nnx.state(model))}
            shapes = {
                name: np.broadcast_to(np.zeros((), x.dtype), x.shape)
                for name, x in variables.items()
            }
            for name, leaf in fitting("flax", shapes, leaves):
                variables[name].set_value(jnp.asarray(leaf))
            return cls(model, package)

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """See `Twin`."""
        return jax_scope(self.dtype, self.device)

    @contextlib.contextmanager
    def package_scope(self) -> Iterator[None]:
        """See `Twin`; operation by operation unless `compiled`."""
        with self.scope(), contextlib.nullcontext() if self.compiled else jax.disable_jit():
            yield

    def ints(self, x: np.ndarray | Sequence[object] | None) -> jax.Array | None:
        """See `Twin`."""
        return None if x is None else jnp.asarray(x, jnp.int32)

    def numpy(self, x: jax.Array) -> np.ndarray:
        """See `Twin`."""
        return np.asarray(x)

    def copy(self) -> FlaxTwin:
        """See `Twin`."""
        model = nnx.merge(*jax.tree.map(jnp.copy, nnx.split(self.model)))
        return FlaxTwin(model, self.package, self.compiled)

    def leaves(self) -> Leaves:
        """See `Twin`."""
        with self.scope():
            return flax_leaves(self.model)

    def load(self, leaves: Mapping[str, np.ndarray]) -> None:
        """See `Twin`."""
        with self.scope():
            load_flax(self.model, leaves)

    def trainer(
        self, constants: Constants, task: str = "next-token", seed: int | None = None
    ) -> FlaxTrainer:
        """See `Twin`."""
        return FlaxTrainer(self, constants, task, seed)

    ints_name = "jax.numpy.array"

    def with_definition(self) -> FlaxTwin:
        """See `Twin`."""
        model = self.model.with_attend(self.package.attention.attend)
        return FlaxTwin(model, self.package, self.compiled)

    def call(
        self,
        decoder: flax_gpt.Decoder,
        function: Callable[..., Result],
        *operands: object,
        static: tuple[object, ...] = (),
    ) -> Result:
        """See `Twin`."""
        return decoder.run(function, *operands, static=static)

    def empty(self, num_rows: int, capacity: int) -> flax_gpt.KVCache:
        """See `Twin`."""
        with self.scope():
            return self.package.KVCache.empty(self.config, num_rows, capacity)

    def forward(
        self, tokens_BT: jax.Array, cache: flax_gpt.KVCache | None, counts_B: jax.Array | None
    ) -> tuple[jax.Array, flax_gpt.KVCache | None]:
        """See `Twin`."""
        if not self.compiled:
            return self.model(tokens_BT, cache, counts_B)
        if cache is not None:  # a program cannot look at lengths
            cache.check_capacity(tokens_BT.shape[1], counts_B)
        return self._program(nnx.state(self.model), tokens_BT, cache, counts_B)

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[jax.Array, flax_gpt.KVCache | None]]:
        graphdef, _ = nnx.split(self.model)
        return jax.jit(lambda parameters, *args: nnx.merge(graphdef, parameters)(*args))


class FlaxTrainer:
    """Training by flax_gpt.train_step; see `TwinTrainer`.

    In every step, the state of a large model is written over the one before.
    """

    def __init__(self, twin: FlaxTwin, constants: Constants, task: str, seed: int | None):
        package, self.scope, self._ints = twin.package, twin.scope, twin.ints
        self._package, self._task = package, task
        self.gradient_norm, self.applied = 0.0, True
        with self.scope():
            key = None if seed is None else package.random.key(seed)
            config = package.TrainConfig(**constants)
            state = package.TrainState.create(twin.model, config, key, task_of(package, task))
            self._step = package.train_step
            if is_large(jax.tree.leaves(state.parameters)):
                parameters = jax.tree.map(jnp.copy, state.parameters)  # the model is the caller's
                state = dataclasses.replace(state, parameters=parameters)
                self._step = donated(
                    lambda batch, state: package.train_step(batch, state), 1, twin.device
                )
            self._state = state

    @property
    def model(self) -> flax_gpt.GPT:
        """The model with its present weights."""
        return self._state.model

    @property
    def loss_scale(self) -> float | None:
        """See `TwinTrainer`."""
        scale = self._state.loss_scale
        return None if scale is None else float(scale.scale)

    def step(self, *inputs: np.ndarray | None) -> float:
        """See `Trainer`; the inputs are tokens, and where there are such, counts and labels."""
        with self.scope():
            result, self._state = self._step(
                self._package.Batch(*map(self._ints, inputs)), self._state
            )
            self.gradient_norm, self.applied = float(result.gradient_norm), bool(result.applied)
            return float(result.loss.mean)

    def evaluate(self, batches: Iterable[Inputs]) -> dict[str, float]:
        """See `TwinTrainer`."""
        return FlaxTwin(self.model, self._package).evaluate(batches, self._task)

    def parameters(self) -> Leaves:
        """See `Trainer`."""
        with self.scope():
            return flax_leaves(self.model)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """See `Trainer`."""
        with self.scope():
            adam = self._state.optimizer[0]
            return state_leaves(adam.mu), state_leaves(adam.nu), int(adam.count)

    def save(self) -> Leaves:
        """See `TwinTrainer`."""
        with self.scope():
            state = self._state
            first, second, updates = self.moments()
            saved = named_state(self.parameters(), first, second, updates, int(state.step))
            if state.key is not None:
                saved["key"] = np.asarray(state.key)
            if state.loss_scale is not None:
                saved["scale"] = np.asarray(state.loss_scale.scale)
                saved["streak"] = np.asarray(state.loss_scale.streak)
            return saved

    def restore(self, saved: Leaves) -> None:
        """See `TwinTrainer`."""
        with self.scope():
            require_same_state(self.save(), saved)
            state, model = self._state, self.model
            load_flax(model, leaves_under("parameters.", saved))
            adam, decay, rate = state.optimizer
            count = jnp.asarray(saved["updates"], jnp.int32)
            adam = optax.ScaleByAdamState(
                count,
                _like(adam.mu, leaves_under("first.", saved)),
                _like(adam.nu, leaves_under("second.", saved)),
            )
            scale = state.loss_scale
            if scale is not None:
                scale = type(scale)(jnp.asarray(saved["scale"]), jnp.asarray(saved["streak"]))
            key = None if state.key is None else jnp.asarray(saved["key"])
            self._state = dataclasses.replace(
                state,
                parameters=nnx.split(model)[1],
                optimizer=(adam, decay, rate._replace(count=count)),
                loss_scale=scale,
                key=key,
                step=jnp.asarray(saved["step"], jnp.int32),
            )


def _like(state: nnx.State, leaves: Leaves) -> nnx.State:
    """Return a tree of variables with other numbers in it."""
    return nnx.map_state(lambda path, v: v.replace(jnp.asarray(leaves[dotted(path)])), state)
