"""The handle of torch_gpt: built, trained, decoded and observed in NumPy. Its twin is flax.py."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

import torch_gpt
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import (
    from_numpy,
    load_torch,
    numpy_view,
    to_numpy,
    torch_leaves,
)
from parity.twins.state import (
    fitting,
    leaves_under,
    named_state,
    require_same_state,
)
from parity.twins.twin import Constants, Inputs, Twin, task_of
from parity.weights.tables import TWINS
from parity.weights.weight_map import links_of

if TYPE_CHECKING:
    from parity.twins.twin import Config


Result = TypeVar("Result")


class TorchTwin(Twin):
    """torch_gpt with weights, a dtype and a device; see `Twin`.

    Args:
        model: a GPT, or a classifier around one.
        package: torch_gpt, or the changed copy of it that the model is of.
    """

    name = "torch_gpt"
    framework = "torch"
    original = torch_gpt

    def __init__(self, model: torch_gpt.GPT, package: ModuleType | None = None):
        self.model, self.package = model, package or self.original
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

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """See `Twin`."""
        return torch.no_grad()

    def package_scope(self) -> contextlib.AbstractContextManager[None]:
        """See `Twin`."""
        return self.scope()

    def ints(self, x: np.ndarray | Sequence[object] | None) -> torch.Tensor | None:
        """See `Twin`."""
        return None if x is None else torch.from_numpy(np.array(x)).long().to(self.device)

    def numpy(self, x: torch.Tensor) -> np.ndarray:
        """See `Twin`."""
        return to_numpy(x)

    def copy(self) -> TorchTwin:
        """See `Twin`."""
        return TorchTwin(copy.deepcopy(self.model), self.package)

    def leaves(self) -> Leaves:
        """See `Twin`."""
        return torch_leaves(self.model)

    def load(self, leaves: Mapping[str, np.ndarray]) -> None:
        """See `Twin`."""
        load_torch(self.model, leaves)

    def trainer(
        self, constants: Constants, task: str = "next-token", seed: int | None = None
    ) -> TorchTrainer:
        """See `Twin`."""
        return TorchTrainer(self, constants, task, seed)

    ints_name = "torch.tensor"

    def with_definition(self) -> TorchTwin:
        """See `Twin`."""
        return TorchTwin(self.model.with_attend(self.package.attention.attend), self.package)

    def call(
        self,
        decoder: torch_gpt.Decoder,
        function: Callable[..., Result],
        *operands: object,
        static: tuple[object, ...] = (),
    ) -> Result:
        """See `Twin`."""
        return function(decoder.model, *operands, *static)

    def empty(self, num_rows: int, capacity: int) -> torch_gpt.KVCache:
        """See `Twin`."""
        return self.package.KVCache.empty(self.config, num_rows, capacity, device=self.device)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        cache: torch_gpt.KVCache | None,
        counts_B: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch_gpt.KVCache | None]:
        """See `Twin`."""
        return self.model(tokens_BT, cache, counts_B)


class TorchTrainer:
    """Training by torch_gpt.train_step, which changes the twin's weights; see `TwinTrainer`."""

    def __init__(self, twin: TorchTwin, constants: Constants, task: str, seed: int | None):
        package = twin.package
        self._package, self._task, self._ints = package, task, twin.ints
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

    def moments(self) -> tuple[Leaves, Leaves, int]:
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
