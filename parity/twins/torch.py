"""The PyTorch twin as the harness uses it: trained, decoded and observed in NumPy."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import (
    from_numpy,
    load_torch,
    numpy_view,
    to_numpy,
    torch_leaves,
)
from parity.twins.state import (
    Calls,
    evaluation_numbers,
    leaves_under,
    named_state,
    require_same_state,
)


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
        return evaluation_numbers(found)

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
        saved = named_state(self.parameters(), first, second, updates, state.step)
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
        require_same_state(self.save(), saved)
        state = self._state
        load_torch(state.model, leaves_under("parameters.", saved))
        first, second = leaves_under("first.", saved), leaves_under("second.", saved)
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


class TorchDecoder:
    """Decoding by torch_gpt's cache."""

    def __init__(self, package: ModuleType, model: torch.nn.Module):
        self._package, self._model = package, model
        self._device = model.token_embedding.weight.device

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Logits of each call (tokens (B, T), counts (B,)), one cache through all of them."""
        batch_size = len(calls[0][0])
        cache = self._package.KVCache.empty(
            self._model.config, batch_size, capacity, device=self._device
        )
        logits = []
        with torch.no_grad():
            for tokens, counts in calls:
                tokens, counts = (
                    torch.from_numpy(x).long().to(self._device) for x in (tokens, counts)
                )
                out, cache = self._model(tokens, cache, counts)
                logits.append(to_numpy(out))
        return logits

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Greedy tokens (B, G)."""
        generation = self._package.generate(
            self._model, tokens, max_new_tokens, counts, use_cache=use_cache
        )
        return to_numpy(generation.tokens_BG).astype(np.int32)

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
        drawn = to_numpy(generation.tokens_BG).astype(np.int32)
        return drawn, to_numpy(generation.margins_BG)
