"""The handle of torch_gpt: built, trained, decoded and observed in NumPy. Its twin is flax.py.

Dimension key: B batch, N heads, T tokens, S positions that they see, V vocab.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

import torch_gpt
from parity.frameworks.leaves import Leaves, cast
from parity.frameworks.protocols import Calls, Moments
from parity.frameworks.torch.leaves import (
    from_numpy,
    load_torch,
    numpy_view,
    to_numpy,
    torch_leaves,
)
from parity.twins.state import (
    evaluation_numbers,
    fitting,
    leaves_under,
    named_state,
    require_same_state,
)
from parity.twins.twin import GREEDY, Constants, Continuation, Inputs, Sampling, task_of
from parity.weights.tables import TWINS
from parity.weights.weight_map import links_of

if TYPE_CHECKING:
    from parity.twins.twin import Config


class TorchTwin:
    """torch_gpt with weights, a dtype and a device; see `Twin`.

    Args:
        model: a GPT, or a classifier around one.
        package: torch_gpt, or the changed copy of it that the model is of.
    """

    name = "torch_gpt"
    framework = "torch"
    original = torch_gpt

    def __init__(self, model: torch_gpt.GPT, package: ModuleType | None = None):
        self.model, self.package = model, package or torch_gpt
        self.device = next(model.parameters()).device

    @classmethod
    def build(
        cls,
        config: Config,
        device: torch.device | None = None,
        *,
        seed: int | None = None,
        leaves: Iterable[tuple[str, np.ndarray]] | None = None,
        package: ModuleType | None = None,
    ) -> TorchTwin:
        """See `Twin`."""
        package, device = package or torch_gpt, device or torch.device("cpu")
        config = package.GPTConfig(**dataclasses.asdict(config))
        if leaves is None:
            key = None if seed is None else package.random.key(seed)
            return cls(package.GPT(config, key).to(device), package)
        with torch.device("meta"):  # nothing is drawn or zeroed that will be written over
            model = package.GPT(config)
        model = model.to_empty(device="cpu")
        arrays = {name: numpy_view(x) for name, x in model.named_parameters()}
        for name, leaf in fitting("torch", arrays, _torch_named(leaves, arrays)):
            np.copyto(arrays[name], leaf)
        return cls(model.to(device), package)

    @property
    def config(self) -> torch_gpt.GPTConfig:
        """Of the model."""
        return self.model.config

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """See `Twin`."""
        return torch.no_grad()

    def copy(self) -> TorchTwin:
        """See `Twin`."""
        return TorchTwin(copy.deepcopy(self.model), self.package)

    def cast(self, dtype: str) -> TorchTwin:
        """See `Twin`."""
        config = dataclasses.replace(self.config, dtype=dtype)
        other = TorchTwin.build(config, self.device, package=self.package)
        other.load(cast(self.leaves(), dtype))
        return other

    def leaves(self) -> Leaves:
        """See `Twin`."""
        return torch_leaves(self.model)

    def load(self, leaves: Mapping[str, np.ndarray]) -> None:
        """See `Twin`."""
        load_torch(self.model, leaves)

    @torch.no_grad()
    def logits(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        """See `Twin`."""
        return to_numpy(self.model(self._ints(tokens_BT), None, self._ints(counts_B))[0])

    def evaluate(self, batches: Iterable[Inputs], task: str = "next-token") -> dict[str, float]:
        """See `Twin`."""
        tensors = (self.package.Batch(*map(self._ints, inputs)) for inputs in batches)
        return evaluation_numbers(
            self.package.evaluate(self.model, tensors, task_of(self.package, task))
        )

    def trainer(
        self, constants: Constants, task: str = "next-token", seed: int | None = None
    ) -> TorchTrainer:
        """See `Twin`."""
        return TorchTrainer(self, constants, task, seed)

    def empty(self, num_rows: int, capacity: int) -> torch_gpt.KVCache:
        """See `Twin`."""
        return self.package.KVCache.empty(self.config, num_rows, capacity, device=self.device)

    @torch.no_grad()
    def read(
        self,
        cache: torch_gpt.KVCache,
        tokens_BT: np.ndarray,
        counts_B: np.ndarray | None = None,
    ) -> tuple[np.ndarray, torch_gpt.KVCache]:
        """See `Twin`."""
        logits_BTV, cache = self.model(self._ints(tokens_BT), cache, self._ints(counts_B))
        return to_numpy(logits_BTV), cache

    @torch.no_grad()
    def select(self, cache: torch_gpt.KVCache, rows: np.ndarray) -> torch_gpt.KVCache:
        """See `Twin`."""
        return cache.select(self._ints(rows))

    @torch.no_grad()
    def truncate(self, cache: torch_gpt.KVCache, lengths_B: np.ndarray) -> torch_gpt.KVCache:
        """See `Twin`."""
        return cache.truncate(self._ints(lengths_B))

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
        return Continuation(to_numpy(found.tokens_BG).astype(np.int32), to_numpy(found.margins_BG))

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
    ) -> TorchStream:
        """See `Twin`."""
        return TorchStream(self, ids, sampling, seed, use_cache)

    @torch.no_grad()
    def attention_weights(
        self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """See `Twin`."""
        maps = self.model.attention_maps(self._ints(tokens_BT), self._ints(counts_B))
        return [to_numpy(x) for x in maps]

    def num_compilations(self) -> int | None:
        """See `Twin`."""
        return self.package.Decoder.num_compilations()

    def _ints(self, x: np.ndarray | Sequence[object] | None) -> torch.Tensor | None:
        return None if x is None else torch.from_numpy(np.array(x)).long().to(self.device)


class TorchStream:
    """One text that grows token by token; see `Stream`."""

    def __init__(
        self, twin: TorchTwin, ids: Sequence[int], sampling: Sampling, seed: int, use_cache: bool
    ):
        self._package, self._ints = twin.package, twin._ints
        self._ids, self._num_drawn, self._use_cache = list(ids), 0, use_cache
        self._decoder = self._package.Decoder(twin.model, 1)
        self._sampling = self._package.Sampling(**sampling)
        self._key = self._package.random.key(seed)
        self._prefill()

    @torch.no_grad()
    def append(self, token: int) -> None:
        """See `Stream`."""
        self._ids.append(token)
        self._num_drawn += 1
        if self._use_cache:
            logits_1V, self._cache = self._decoder.advance(self._ints([token]), self._cache)
            self._score(logits_1V)
        else:
            self._prefill()

    @torch.no_grad()
    def _prefill(self) -> None:
        logits_1V, self._cache = self._decoder.prefill(self._ints([self._ids]))
        self._score(logits_1V)

    def _score(self, logits_1V: torch.Tensor) -> None:
        scores_1V = logits_1V
        if self._sampling.temperature > 0.0:
            filtered_1V = self._package.filter_logits(logits_1V, self._sampling)
            key = self._package.random.fold_in(self._key, self._num_drawn)
            scores_1V = self._package.random.perturb(key, filtered_1V)
        self.logits_V, self.scores_V = (
            to_numpy(x)[0].astype(np.float64) for x in (logits_1V, scores_1V)
        )


class TorchTrainer:
    """Training by torch_gpt.train_step, which changes the twin's weights; see `TwinTrainer`."""

    def __init__(self, twin: TorchTwin, constants: Constants, task: str, seed: int | None):
        package = twin.package
        self._package, self._task, self._ints = package, task, twin._ints
        self._device = twin.device
        self.gradient_norm, self.applied = 0.0, True
        key = None if seed is None else package.random.key(seed).to(twin.device)
        config = package.TrainConfig(**constants)
        self._state = package.TrainState.create(twin.model, config, key, task_of(package, task))

    @property
    def model(self) -> torch_gpt.GPT:
        """The model with its present weights."""
        return self._state.model

    @property
    def loss_scale(self) -> float | None:
        """See `TwinTrainer`."""
        scale = self._state.loss_scale
        return None if scale is None else float(scale.get_scale())

    def step(self, *inputs: np.ndarray | None) -> float:
        """See `Trainer`; the inputs are tokens, and where there are such, counts and labels."""
        batch = self._package.Batch(*map(self._ints, inputs))
        result, self._state = self._package.train_step(batch, self._state)
        self.gradient_norm, self.applied = float(result.gradient_norm), bool(result.applied)
        return float(result.loss.mean)

    def evaluate(self, batches: Iterable[Inputs]) -> dict[str, float]:
        """See `TwinTrainer`."""
        return TorchTwin(self.model, self._package).evaluate(batches, self._task)

    def parameters(self) -> Leaves:
        """See `Trainer`."""
        return torch_leaves(self.model)

    def moments(self) -> Moments:
        """See `Trainer`."""
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
        """See `TwinTrainer`."""
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
        """See `TwinTrainer`."""
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


def flax_named(leaves: Leaves) -> Leaves:
    """Return leaves of torch_gpt under flax_gpt's names and in its layouts."""
    links = links_of(TWINS, leaves)
    return {name: x for link in links for name, x in link.to_flax(leaves).items()}


def _torch_named(
    leaves: Iterable[tuple[str, np.ndarray]], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield leaves of flax_gpt under torch_gpt's names and in its layouts."""
    links = {link.flax: link for link in links_of(TWINS, tuple(names))}
    for name, leaf in leaves:
        link = links.get((name,))
        yield from link.to_torch({name: leaf}).items() if link else [(name, leaf)]
