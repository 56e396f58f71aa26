"""Training by either twin's train_step, with all of its state as named NumPy arrays.

The two classes have the same methods. A saved state has `parameters.`, `first.` and `second.` with
a leaf behind them, `updates`, `step`, and where there are such: `key`, `scale`, `streak`.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from parity.donation import donated
from parity.flax_leaves import flax_leaves, load_flax, state_leaves
from parity.leaves import Leaves, copied, different_leaves, dotted
from parity.memory import is_large
from parity.torch_leaves import from_numpy, load_torch, numpy_view, to_numpy, torch_leaves


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
        return _numbers(found)

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
        saved = _named(self.parameters(), first, second, updates, int(state.step))
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
        _require_same(self.save(), saved)
        state, model = self._state, self.model
        load_flax(model, _under("parameters.", saved))
        adam, decay, rate = state.optimizer
        count = jnp.asarray(saved["updates"], jnp.int32)
        adam = optax.ScaleByAdamState(
            count,
            _like(adam.mu, _under("first.", saved)),
            _like(adam.nu, _under("second.", saved)),
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


class TorchTrainer:
    """Training by torch_gpt.train_step.

    Args:
        package: torch_gpt, or a changed copy of it.
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
        model: torch.nn.Module,
        constants: Mapping[str, Any],
        task: str = "NEXT_TOKEN",
        seed: int | None = None,
    ):
        self._package = package
        config, key = package.TrainConfig(**constants), None
        self._device = next(model.parameters()).device
        if seed is not None:
            key = package.random.key(seed).to(self._device)
        self._state = package.TrainState.create(model, config, key, getattr(package, task))
        self.gradient_norm, self.applied = 0.0, True

    @property
    def model(self) -> torch.nn.Module:
        """The model with its present weights."""
        return self._state.model

    @property
    def loss_scale(self) -> float | None:
        """What float16 multiplies the loss by; None in other types."""
        scale = self._state.loss_scale
        return None if scale is None else float(scale.get_scale())

    def step(
        self,
        tokens: np.ndarray,
        counts: np.ndarray | None = None,
        labels: np.ndarray | None = None,
    ) -> float:
        """One step; the loss before it."""
        batch = self._batch(tokens, counts, labels)
        result, self._state = self._package.train_step(batch, self._state)
        self.gradient_norm, self.applied = float(result.gradient_norm), bool(result.applied)
        return float(result.loss.mean)

    def evaluate(self, batches: list[tuple[np.ndarray, ...]]) -> dict[str, float]:
        """Loss, perplexity and accuracy over the scored tokens of all batches."""
        found = self._package.evaluate(
            self.model, (self._batch(*arrays) for arrays in batches), self._state.task
        )
        return _numbers(found)

    def parameters(self) -> Leaves:
        """The present weights."""
        return torch_leaves(self.model)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, and the number of updates.

        They are to be read before the next step.
        """
        first, second, updates = {}, {}, 0
        for name, parameter in self.model.named_parameters():
            # Before the first update torch has no moments, which is to say that they are zero.
            state = self._state.optimizer.state.get(parameter, {})
            for leaves, kind in ((first, "exp_avg"), (second, "exp_avg_sq")):
                present = state[kind] if kind in state else torch.zeros_like(parameter)
                leaves[name] = numpy_view(present.cpu())
            updates = max(updates, int(state.get("step", 0)))
        return first, second, updates

    def save(self) -> Leaves:
        """Everything that the next step depends on."""
        state = self._state
        first, second, updates = self.moments()
        saved = _named(self.parameters(), first, second, updates, state.step)
        if state.key is not None:
            saved["key"] = to_numpy(state.key)
        if state.loss_scale is not None:
            scaler = state.loss_scale.state_dict()
            saved["scale"] = np.array(scaler["scale"], np.float32)
            saved["streak"] = np.array(scaler["_growth_tracker"], np.int32)
        return saved

    def restore(self, saved: Leaves) -> None:
        """Goes on from what `save` gave.

        Raises:
            ValueError: when names, shapes or dtypes are not exactly this trainer's.
        """
        _require_same(self.save(), saved)
        state = self._state
        load_torch(state.model, _under("parameters.", saved))
        first, second = _under("first.", saved), _under("second.", saved)
        for name, parameter in state.model.named_parameters():
            state.optimizer.state[parameter] = {
                "step": torch.tensor(float(saved["updates"])),
                "exp_avg": from_numpy(first[name]).to(self._device),
                "exp_avg_sq": from_numpy(second[name]).to(self._device),
            }
        if state.loss_scale is not None:
            scaler = state.loss_scale.state_dict()
            scaler["scale"], scaler["_growth_tracker"] = (
                float(saved["scale"]),
                int(saved["streak"]),
            )
            state.loss_scale.load_state_dict(scaler)
        key = None if state.key is None else from_numpy(saved["key"]).to(self._device)
        self._state = dataclasses.replace(state, key=key, step=int(saved["step"]))

    def _batch(self, tokens, counts=None, labels=None):
        tensors = (
            None if x is None else torch.from_numpy(np.array(x)).long().to(self._device)
            for x in (tokens, counts, labels)
        )
        return self._package.Batch(*tensors)


def _named(parameters: Leaves, first: Leaves, second: Leaves, updates: int, step: int) -> Leaves:
    groups = {"parameters.": parameters, "first.": copied(first), "second.": copied(second)}
    named = {prefix + name: x for prefix, leaves in groups.items() for name, x in leaves.items()}
    return named | {"updates": np.array(updates, np.int64), "step": np.array(step, np.int64)}


def _under(prefix: str, saved: Leaves) -> Leaves:
    return {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}


def _numbers(evaluation: Any) -> dict[str, float]:
    return {
        "loss": float(evaluation.loss.mean),
        "perplexity": float(evaluation.loss.perplexity),
        "accuracy": float(evaluation.accuracy),
        "tokens": int(evaluation.loss.num_tokens),
    }


def _like(state: Any, leaves: Leaves) -> Any:
    """The same tree of variables with other numbers in it."""
    return nnx.map_state(lambda path, v: v.replace(jnp.asarray(leaves[dotted(path)])), state)


def _require_same(present: Leaves, given: Leaves) -> None:
    if problems := different_leaves(present, given):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{'; '.join(problems[:3])}{more}. A state is exactly the trainer's. Go on with the "
            "configuration that it was written with."
        )
