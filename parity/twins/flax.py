"""The Flax twin as the harness uses it: trained, decoded and observed in NumPy."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity.frameworks.flax.donation import donated
from parity.frameworks.flax.leaves import flax_leaves, load_flax, state_leaves
from parity.frameworks.leaves import Leaves, dotted
from parity.system.memory import is_large
from parity.twins.state import (
    Calls,
    evaluation_numbers,
    leaves_under,
    named_state,
    require_same_state,
)


class FlaxTrainer:
    """Training by flax_gpt.train_step. The state of a large model is written over in every step.

    Args:
        package: flax_gpt, or a changed copy of it.
        model: with its initial weights.
        constants: fields of TrainConfig.
        task: name of one of the package's tasks.
        seed: of dropout; None for none.

    Attributes:
        gradient_norm: of the last step, before clipping.
        applied: whether the last step's gradient was finite, and so applied.
    """

    def __init__(
        self,
        package: ModuleType,
        model: nnx.Module,
        constants: Mapping[str, Any],
        task: str = "NEXT_TOKEN",
        seed: int | None = None,
    ):
        self._package = package
        config, key = package.TrainConfig(**constants), None
        if seed is not None:
            key = package.random.key(seed)
        self._state = package.TrainState.create(model, config, key, getattr(package, task))
        self._step = package.train_step
        leaves = jax.tree.leaves(self._state.parameters)
        if is_large(leaves):
            parameters = jax.tree.map(jnp.copy, self._state.parameters)  # the model is the caller's
            self._state = dataclasses.replace(self._state, parameters=parameters)
            (device,) = leaves[0].devices()
            self._step = donated(lambda batch, state: package.train_step(batch, state), 1, device)
        self.gradient_norm, self.applied = 0.0, True

    @property
    def model(self) -> nnx.Module:
        """The model with its present weights."""
        return self._state.model

    @property
    def loss_scale(self) -> float | None:
        """What float16 multiplies the loss by; None in other types."""
        scale = self._state.loss_scale
        return None if scale is None else float(scale.scale)

    def step(
        self,
        tokens: np.ndarray,
        counts: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> float:
        """One step; the loss before it."""
        batch = self._batch(tokens, counts, labels)
        result, self._state = self._step(batch, self._state)
        self.gradient_norm, self.applied = float(result.gradient_norm), bool(result.applied)
        return float(result.loss.mean)

    def evaluate(self, batches: list[tuple[np.ndarray, ...]]) -> dict[str, float]:
        """Loss, perplexity and accuracy over the scored tokens of all batches."""
        found = self._package.evaluate(
            self.model, (self._batch(*arrays) for arrays in batches), self._state.task
        )
        return evaluation_numbers(found)

    def parameters(self) -> Leaves:
        """The present weights."""
        return flax_leaves(self.model)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, and the number of updates.

        They are to be read before the next step.
        """
        adam = self._state.optimizer[0]
        return state_leaves(adam.mu), state_leaves(adam.nu), int(adam.count)

    def save(self) -> Leaves:
        """Everything that the next step depends on."""
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
        """Goes on from what `save` gave.

        Raises:
            ValueError: when names, shapes or dtypes are not exactly this trainer's.
        """
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

    def _batch(self, tokens, counts=None, labels=None):
        arrays = (None if x is None else jnp.asarray(x, jnp.int32) for x in (counts, labels))
        return self._package.Batch(jnp.asarray(tokens, jnp.int32), *arrays)


def _like(state: Any, leaves: Leaves) -> Any:
    """The same tree of variables with other numbers in it."""
    return nnx.map_state(lambda path, v: v.replace(jnp.asarray(leaves[dotted(path)])), state)


class FlaxDecoder:
    """Decoding by flax_gpt's cache."""

    def __init__(self, package: ModuleType, model: nnx.Module):
        self._package, self._model = package, model
        graphdef, self._parameters = nnx.split(model)
        self._call = jax.jit(lambda parameters, *args: nnx.merge(graphdef, parameters)(*args))

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Logits of each call (tokens (B, T), counts (B,)), one cache through all of them."""
        cache = self._package.KVCache.empty(self._model.config, len(calls[0][0]), capacity)
        logits = []
        for tokens, counts in calls:
            cache.check_room(tokens.shape[1], jnp.asarray(counts))
            out, cache = self._call(self._parameters, jnp.asarray(tokens), cache, counts)
            logits.append(np.asarray(out))
        return logits

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Greedy tokens (B, G)."""
        generation = self._package.generate(
            self._model, tokens, max_new_tokens, counts, use_cache=use_cache
        )
        return np.asarray(generation.tokens_BG)

    def sample(
        self,
        tokens: np.ndarray,
        counts: np.ndarray,
        max_new_tokens: int,
        sampling: Mapping[str, Any],
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drawn tokens and their margins, (B, G) each."""
        generation = self._package.generate(
            self._model,
            tokens,
            max_new_tokens,
            counts,
            sampling=self._package.Sampling(**sampling),
            key=self._package.random.key(seed),
        )
        return np.asarray(generation.tokens_BG), np.asarray(generation.margins_BG)
