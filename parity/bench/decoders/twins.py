"""Decoding by either twin: its own cached step, other steps after the same prompt, and no cache."""

import time
from collections.abc import Callable, Iterator
from typing import Generic

import numpy as np

from parity.bench.decoders.protocol import (
    Array,
    Arrays,
    Cache,
    DecodeTask,
    State,
    TimedTokens,
    timed_steps,
)
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin


class TwinStep(Generic[Cache, Array]):
    """A twin's Decoder.advance in a Python loop, with the choice on the device.

    Args:
        arrays: operations of its framework.
        task: what is decoded.
        prefill: reads the prompt into a new cache and scores the next token.
        advance: appends one token per row and scores the next.
        ran: see `Decoder`.
        extra_weight_bytes: see `Decoder`.
    """

    form = "cached"
    reads_prompt = True

    def __init__(
        self,
        arrays: Arrays[Cache, Array],
        task: DecodeTask,
        prefill: Callable[[], tuple[Array, Cache]],
        advance: Callable[[Array, Cache], tuple[Array, Cache]],
        ran: str,
        extra_weight_bytes: int | None,
    ):
        self.name, self.ran = f"{arrays.framework} step", ran
        self.extra_weight_bytes = extra_weight_bytes
        self.arrays, self.task, self._prefill, self._advance = arrays, task, prefill, advance
        self._prefilled: tuple[Array, Cache] | None = None
        self._filled = False

    def prefill(self) -> None:
        """Run Decoder.prefill."""
        self._prefilled, self._filled = None, False  # its memory can be reused
        self._prefilled = self._prefill()
        self.arrays.wait(self._prefilled)

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Append tokens to the prompt."""
        return timed_steps(self, self.arrays, num_steps)

    def start(self) -> State[Cache, Array]:
        """Copy the cache after the prompt, its free slots filled, and choose the first token."""
        logits_BV, cache = self._after_prompt()
        if not self._filled:
            cache = self.arrays.with_noise(cache, self.task.prompt_length)
            self._prefilled, self._filled = (logits_BV, cache), True
        cache, token_B = self.arrays.copy(cache), self.arrays.greedy(logits_BV)
        return State(cache, token_B, self.task.prompt_length)

    def advance(self, state: State[Cache, Array]) -> State[Cache, Array]:
        """Start one step."""
        logits_BV, cache = self._advance(state.token_B, state.cache)
        return State(cache, self.arrays.greedy(logits_BV), state.length + 1)

    def wait(self, state: State[Cache, Array]) -> None:
        """Block until the state is computed."""
        self.arrays.wait(state)

    @property
    def cache(self) -> Cache:
        """The cache after the prompt."""
        return self._after_prompt()[1]

    def logits_along(self, tokens_BG: np.ndarray) -> Iterator[np.ndarray]:
        """Yield logits (B, V) after the prompt, and after each of these tokens but the last."""
        yield self.arrays.on_host(self._after_prompt()[0])
        cache = self.start().cache
        for token_B in tokens_BG.T[:-1]:
            tokens = self.arrays.tokens(token_B, self.task.device)
            logits_BV, cache = self._advance(tokens, cache)
            yield self.arrays.on_host(logits_BV)

    def _after_prompt(self) -> tuple[Array, Cache]:
        if self._prefilled is None:
            self.prefill()
        assert self._prefilled is not None
        return self._prefilled


class OtherStep(Generic[Cache, Array]):
    """Another cached step, after the prompt that a twin's step has read.

    Args:
        name: see `Decoder`.
        ran: see `Decoder`.
        reader: the twin's step.
        step: appends token_B to a cache whose rows hold `length` tokens, and scores the next.
        extra_weight_bytes: see `Decoder`.
    """

    form = "cached"
    reads_prompt = False

    def __init__(
        self,
        name: str,
        ran: str,
        reader: TwinStep[Cache, Array],
        step: Callable[[Array, Cache, int], tuple[Array, Cache]],
        extra_weight_bytes: int | None,
    ):
        self.name, self.ran, self.extra_weight_bytes = name, ran, extra_weight_bytes
        self._reader, self._step = reader, step

    def prefill(self) -> None:
        """Do nothing: the reader has read the prompt."""

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Append tokens to the prompt."""
        return timed_steps(self, self._reader.arrays, num_steps)

    def start(self) -> State[Cache, Array]:
        """Copy the reader's state, with a slot for every token of a full round."""
        state, context = self._reader.start(), self._reader.task.context
        return state._replace(cache=self._reader.arrays.grow(state.cache, context))

    def advance(self, state: State[Cache, Array]) -> State[Cache, Array]:
        """Start one step."""
        logits_BV, cache = self._step(state.token_B, state.cache, state.length)
        return State(cache, self._reader.arrays.greedy(logits_BV), state.length + 1)

    def wait(self, state: State[Cache, Array]) -> None:
        """Block until the state is computed."""
        self._reader.wait(state)


class Uncached:
    """A twin's `generate` without a cache.

    Args:
        twin: its handle.
        task: what is decoded.
    """

    form = "uncached"
    reads_prompt = False
    extra_weight_bytes: int | None = 0

    def __init__(self, twin: FlaxTwin | TorchTwin, task: DecodeTask):
        self.name = f"{twin.framework} uncached"
        how = "one compiled loop" if twin.framework == "flax" else "eager"
        self.ran = f"generate(use_cache=False): {how}, every token from the whole sequence"
        self._twin, self._prompt_BT = twin, task.prompt_BT

    def prefill(self) -> None:
        """Do nothing: no state is kept."""

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Share the time among all tokens: the first costs as much as every other."""
        start = time.perf_counter()
        found = self._twin.write(self._prompt_BT, num_steps + 1, use_cache=False)
        seconds = time.perf_counter() - start
        return TimedTokens(found.tokens_BG, seconds * num_steps / (num_steps + 1))
