"""The torch twin's decoding in each of its forms. Read beside parity/bench/flax_decoders.py."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import torch_gpt
from parity.bench.contenders import Cell, Turn, garbage_like
from parity.bench.step_pairs import Steps
from parity.frameworks.torch.leaves import to_numpy


class TorchSteps:
    """torch_gpt.Decoder.step in a Python loop, with the choice on the device.

    Args:
        model: the twin, on its device.
        cell: what is decoded.
        capacity: slots of the cache; None for what the decoder takes.
    """

    name = "torch step"
    framework = "torch"
    form = "cached"
    reads = True

    def __init__(self, model: torch.nn.Module, cell: Cell, capacity: int | None = None):
        self._cell, self._capacity = cell, capacity
        self._device = cell.devices.torch
        self._decoder = torch_gpt.Decoder(model, cell.batch_size)
        self._prompt_BT = torch.from_numpy(cell.prompt_BT).long().to(self._device)
        self.extra_bytes = self._decoder.extra_bytes
        how = "eager" if self._device.type == "cpu" else "one compiled graph per step"
        self.ran = f"Decoder.step in a Python loop, {how}; the newest handle writes in place"
        self._behind = self._logits_BV = None
        self._littered = False

    @property
    def model(self) -> torch.nn.Module:
        """The twin with its weights laid out for the steps."""
        return self._decoder.model

    @torch.no_grad()
    def prefill(self) -> None:
        """Decoder.prefill."""
        self._logits_BV = self._behind = None  # their memory can be taken again
        self._littered = False
        self._logits_BV, self._behind = self._decoder.prefill(
            self._prompt_BT, capacity=self._capacity
        )
        wait_for_torch(self._device)

    def turn(self, num_steps: int) -> Turn:
        """Steps, and the first token of each turn from the prompt."""
        return torch_turn(self, num_steps)

    def advance(self, state: tuple[Any, torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """The cache and the chosen token a step later."""
        cache, token_B = state
        logits_BV, cache = self._decoder.advance(token_B, cache)
        return cache, torch.argmax(logits_BV, dim=-1)

    def wait(self, state: tuple[Any, torch.Tensor]) -> None:
        """Until the device has done all that it was asked."""
        wait_for_torch(self._device)

    @torch.no_grad()
    def state(self) -> tuple[Any, torch.Tensor]:
        """A copy of the cache behind the prompt, garbage in its free slots, and the first token."""
        # All rows selected are a new allocation, which owns its free slots.
        rows_B = torch.arange(self._cell.batch_size)
        if not self._littered:
            self._behind, self._littered = self._behind.select(rows_B), True
            for layer in self._behind.layers:
                for slots_BKSH in (layer.keys_BKSH, layer.values_BKSH):
                    garbage_BKSH = torch.from_numpy(garbage_like(tuple(slots_BKSH.shape)))
                    free = slice(self._cell.prompt_length, None)
                    slots_BKSH[:, :, free] = garbage_BKSH[:, :, free].to(slots_BKSH)
        cache = self._behind.select(rows_B)
        return cache, torch.argmax(self._logits_BV, dim=-1)

    @property
    def cache(self) -> Any:
        """The cache behind the prompt."""
        return self._behind

    @torch.no_grad()
    def logits_along(self, tokens_BG: np.ndarray) -> Iterator[np.ndarray]:
        """Logits (B, V) behind the prompt, and behind each of these tokens but the last."""
        yield to_numpy(self._logits_BV.float())
        cache, _ = self.state()
        for token_B in tokens_BG.T[:-1]:
            token_B = torch.from_numpy(token_B.copy()).long().to(self._device)
            logits_BV, cache = self._decoder.advance(token_B, cache)
            yield to_numpy(logits_BV.float())


class TorchUncached:
    """torch_gpt.generate without a cache.

    Args:
        model: the twin, on its device.
        cell: what is decoded.
    """

    name = "torch uncached"
    framework = "torch"
    form = "uncached"
    ran = "generate(use_cache=False): eager, every token from the whole sequence"
    reads = False
    extra_bytes = 0

    def __init__(self, model: torch.nn.Module, cell: Cell):
        self._device = cell.devices.torch
        self._decoder = torch_gpt.Decoder(model, cell.batch_size, packed=False)
        self._prompt_BT = torch.from_numpy(cell.prompt_BT).long().to(self._device)

    def prefill(self) -> None:
        """Nothing is kept, so nothing is read ahead."""

    def turn(self, num_steps: int) -> Turn:
        """Time is by token: the first costs as much as every other."""
        start = time.perf_counter()
        generation = torch_gpt.generate(
            self._decoder, self._prompt_BT, num_steps + 1, use_cache=False
        )
        wait_for_torch(self._device)
        seconds = time.perf_counter() - start
        return Turn(to_numpy(generation.tokens_BG), seconds * num_steps / (num_steps + 1))


def torch_turn(steps: Steps, num_steps: int) -> Turn:
    """A turn of who can be stopped after each step, whose state has the chosen token second."""
    state = steps.state()
    found = [state[1]]
    steps.wait(state)
    start = time.perf_counter()
    for _ in range(num_steps):
        state = steps.advance(state)
        found.append(state[1])
    steps.wait(state)
    seconds = time.perf_counter() - start
    return Turn(to_numpy(torch.stack(found, dim=1)), seconds)


def wait_for_torch(device: torch.device) -> None:
    """Until all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
