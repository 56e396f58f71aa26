"""The handle of flax_gpt: built, trained, decoded and observed in NumPy. Its twin is torch.py.

Dimension key: B batch, N heads, T tokens, S positions that they see, V vocab.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_gpt
from parity.frameworks.flax.donation import donated
from parity.frameworks.flax.leaves import flax_leaves, load_flax, state_leaves
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, cast, dotted
from parity.frameworks.protocols import Calls, Moments
from parity.system.memory import is_large
from parity.twins.state import (
    evaluation_numbers,
    fitting,
    leaves_under,
    named_state,
    require_same_state,
)
from parity.twins.twin import GREEDY, Constants, Continuation, Inputs, Sampling, task_of

if TYPE_CHECKING:
    from parity.twins.twin import Config

Args = ParamSpec("Args")
Result = TypeVar("Result")


class _Scoped(Protocol):
    def scope(self) -> contextlib.AbstractContextManager[None]: ...


Self = TypeVar("Self", bound=_Scoped)


def _scoped(
    method: Callable[Concatenate[Self, Args], Result],
) -> Callable[Concatenate[Self, Args], Result]:
    """Run a method in the scope of its object."""

    @functools.wraps(method)
    def run(self: Self, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        with self.scope():
            return method(self, *args, **kwargs)

    return run


class FlaxTwin:
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
        self.model, self.package, self.compiled = model, package or flax_gpt, compiled
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

    @property
    def config(self) -> flax_gpt.GPTConfig:
        """Of the model."""
        return self.model.config

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """See `Twin`."""
        return jax_scope(self.dtype, self.device)

    def copy(self) -> FlaxTwin:
        """See `Twin`."""
        model = nnx.merge(*jax.tree.map(jnp.copy, nnx.split(self.model)))
        return FlaxTwin(model, self.package, self.compiled)

    def cast(self, dtype: str) -> FlaxTwin:
        """See `Twin`."""
        config = dataclasses.replace(self.config, dtype=dtype)
        other = FlaxTwin.build(config, self.device, package=self.package)
        other.load(cast(self.leaves(), dtype))
        return FlaxTwin(other.model, self.package, self.compiled)

    @_scoped
    def leaves(self) -> Leaves:
        """See `Twin`."""
        return flax_leaves(self.model)

    @_scoped
    def load(self, leaves: Mapping[str, np.ndarray]) -> None:
        """See `Twin`."""
        load_flax(self.model, leaves)

    @_scoped
    def logits(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        """See `Twin`."""
        return np.asarray(self._call(_ints(tokens_BT), None, _ints(counts_B))[0])

    def evaluate(self, batches: Iterable[Inputs], task: str = "next-token") -> dict[str, float]:
        """See `Twin`."""
        with self._programs():
            arrays = (self.package.Batch(*map(_ints, inputs)) for inputs in batches)
            return evaluation_numbers(
                self.package.evaluate(self.model, arrays, task_of(self.package, task))
            )

    def trainer(
        self, constants: Constants, task: str = "next-token", seed: int | None = None
    ) -> FlaxTrainer:
        """See `Twin`."""
        return FlaxTrainer(self, constants, task, seed)

    @_scoped
    def empty(self, num_rows: int, capacity: int) -> flax_gpt.KVCache:
        """See `Twin`."""
        return self.package.KVCache.empty(self.config, num_rows, capacity)

    @_scoped
    def read(
        self,
        cache: flax_gpt.KVCache,
        tokens_BT: np.ndarray,
        counts_B: np.ndarray | None = None,
    ) -> tuple[np.ndarray, flax_gpt.KVCache]:
        """See `Twin`."""
        if self.compiled:  # a program cannot look at lengths
            cache.check_capacity(tokens_BT.shape[1], _ints(counts_B))
        logits_BTV, cache = self._call(_ints(tokens_BT), cache, _ints(counts_B))
        return np.asarray(logits_BTV), cache

    @_scoped
    def select(self, cache: flax_gpt.KVCache, rows: np.ndarray) -> flax_gpt.KVCache:
        """See `Twin`."""
        return cache.select(_ints(rows))

    @_scoped
    def truncate(self, cache: flax_gpt.KVCache, lengths_B: np.ndarray) -> flax_gpt.KVCache:
        """See `Twin`."""
        return cache.truncate(_ints(lengths_B))

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """See `Decoder`."""
        cache, found = self.empty(len(calls[0][0]), capacity), []
        for tokens_BT, counts_B in calls:
            logits_BTV, cache = self.read(cache, tokens_BT, counts_B)
            found.append(logits_BTV)
        return found

    def write(
        self,
        tokens_BT: np.ndarray,
        max_new_tokens: int,
        counts_B: np.ndarray | None = None,
        *,
        use_cache: bool = True,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> Continuation:
        """See `Twin`."""
        package = self.package
        with self._programs():
            found = package.generate(
                self.model,
                tokens_BT,
                max_new_tokens,
                counts_B,
                stop_ids,
                use_cache,
                package.Sampling(**sampling),
                package.random.key(seed) if sampling["temperature"] else None,
            )
            return Continuation(np.asarray(found.tokens_BG), np.asarray(found.margins_BG))

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """See `Decoder`."""
        return self.write(tokens, max_new_tokens, counts, use_cache=use_cache).tokens_BG

    def sample(
        self,
        tokens: np.ndarray,
        counts: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Decoder`."""
        found = self.write(tokens, max_new_tokens, counts, sampling=sampling, seed=seed)
        return found.tokens_BG, found.margins_BG

    def stream(
        self, ids: Sequence[int], sampling: Sampling = GREEDY, seed: int = 0, use_cache: bool = True
    ) -> FlaxStream:
        """See `Twin`."""
        return FlaxStream(self, ids, sampling, seed, use_cache)

    @_scoped
    def attention_weights(
        self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """See `Twin`."""
        maps = self.model.attention_maps(_ints(tokens_BT), _ints(counts_B))
        return [np.asarray(x) for x in maps]

    def num_compilations(self) -> int | None:
        """See `Twin`."""
        return self.package.Decoder.num_compilations()

    @contextlib.contextmanager
    def _programs(self) -> Iterator[None]:
        """Compute in scope, and operation by operation unless `compiled`."""
        with self.scope(), contextlib.nullcontext() if self.compiled else jax.disable_jit():
            yield

    @functools.cached_property
    def _call(self) -> Callable[..., tuple[jax.Array, flax_gpt.KVCache | None]]:
        """The model's forward pass: (tokens, cache, counts) to logits and cache."""
        if not self.compiled:
            return self.model
        graphdef, _ = nnx.split(self.model)
        program = jax.jit(lambda parameters, *args: nnx.merge(graphdef, parameters)(*args))
        return lambda *args: program(nnx.state(self.model), *args)


class FlaxStream:
    """One text that grows token by token; see `Stream`."""

    def __init__(
        self, twin: FlaxTwin, ids: Sequence[int], sampling: Sampling, seed: int, use_cache: bool
    ):
        self.scope, self._package = twin.scope, twin.package
        self._ids, self._num_drawn, self._use_cache = list(ids), 0, use_cache
        with self.scope():
            self._decoder = self._package.Decoder(twin.model, 1)
            self._sampling = self._package.Sampling(**sampling)
            self._key = self._package.random.key(seed)
            self._prefill()

    @_scoped
    def append(self, token: int) -> None:
        """See `Stream`."""
        self._ids.append(token)
        self._num_drawn += 1
        if self._use_cache:
            logits_1V, self._cache = self._decoder.advance(_ints([token]), self._cache)
            self._score(logits_1V)
        else:
            self._prefill()

    def _prefill(self) -> None:
        logits_1V, self._cache = self._decoder.prefill(_ints([self._ids]))
        self._score(logits_1V)

    def _score(self, logits_1V: jax.Array) -> None:
        scores_1V = logits_1V
        if self._sampling.temperature > 0.0:
            filtered_1V = self._package.filter_logits(logits_1V, self._sampling)
            key = self._package.random.fold_in(self._key, self._num_drawn)
            scores_1V = self._package.random.perturb(key, filtered_1V)
        self.logits_V, self.scores_V = (
            np.asarray(x)[0].astype(np.float64) for x in (logits_1V, scores_1V)
        )


class FlaxTrainer:
    """Training by flax_gpt.train_step; see `TwinTrainer`.

    In every step, the state of a large model is written over the one before.
    """

    def __init__(self, twin: FlaxTwin, constants: Constants, task: str, seed: int | None):
        package, self.scope = twin.package, twin.scope
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

    @_scoped
    def step(self, *inputs: np.ndarray | None) -> float:
        """See `Trainer`; the inputs are tokens, and where there are such, counts and labels."""
        result, self._state = self._step(self._package.Batch(*map(_ints, inputs)), self._state)
        self.gradient_norm, self.applied = float(result.gradient_norm), bool(result.applied)
        return float(result.loss.mean)

    def evaluate(self, batches: Iterable[Inputs]) -> dict[str, float]:
        """See `TwinTrainer`."""
        return FlaxTwin(self.model, self._package).evaluate(batches, self._task)

    @_scoped
    def parameters(self) -> Leaves:
        """See `Trainer`."""
        return flax_leaves(self.model)

    @_scoped
    def moments(self) -> Moments:
        """See `Trainer`."""
        adam = self._state.optimizer[0]
        return state_leaves(adam.mu), state_leaves(adam.nu), int(adam.count)

    @_scoped
    def save(self) -> Leaves:
        """See `TwinTrainer`."""
        state = self._state
        first, second, updates = self.moments()
        saved = named_state(self.parameters(), first, second, updates, int(state.step))
        if state.key is not None:
            saved["key"] = np.asarray(state.key)
        if state.loss_scale is not None:
            saved["scale"] = np.asarray(state.loss_scale.scale)
            saved["streak"] = np.asarray(state.loss_scale.streak)
        return saved

    @_scoped
    def restore(self, saved: Leaves) -> None:
        """See `TwinTrainer`."""
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


def _ints(x: np.ndarray | Sequence[object] | None) -> jax.Array | None:
    return None if x is None else jnp.asarray(x, jnp.int32)
