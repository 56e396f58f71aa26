"""Decoding by either twin, step by step with a cache, and without one."""

import dataclasses
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


@dataclasses.dataclass
class StepDecoder(Generic[Cache, Array]):
    """Cached steps in a Python loop, with the choice on the device; see `Decoder`.

    Attributes:
        arrays: operations of its framework.
        task: what is decoded.
        read: reads the prompt into a cache and scores the next token.
        step: appends a state's token to its cache and scores the next.
    """

    name: str
    ran: str
    arrays: Arrays[Cache, Array]
    task: DecodeTask
    read: Callable[[], tuple[Array, Cache]]
    step: Callable[[State[Cache, Array]], tuple[Array, Cache]]
    extra_weight_bytes: int | None
    reads_prompt: bool = True
    form: str = "cached"
    _prefilled: tuple[Array, Cache] | None = None
    _filled: bool = False

    def prefill(self) -> None:
        """Read the prompt and wait for the result."""
        self._prefilled, self._filled = None, False  # its memory can be reused
        self._prefilled = self.read()
        self.arrays.wait(self._prefilled)

    @property
    def after_prompt(self) -> tuple[Array, Cache]:
        """Logits (B, V) and the cache after the prompt."""
        if self._prefilled is None:
            self.prefill()
        assert self._prefilled is not None
        return self._prefilled

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Append tokens to the prompt."""
        return timed_steps(self, self.arrays, num_steps)

    def start(self) -> State[Cache, Array]:
        """Copy the cache after the prompt, its free slots filled, and choose the first token."""
        logits_BV, cache = self.after_prompt
        if not self._filled:
            cache = self.arrays.with_noise(cache, self.task.prompt_length)
            self._prefilled, self._filled = (logits_BV, cache), True
        cache, token_B = self.arrays.copy(cache), self.arrays.greedy(logits_BV)
        return State(cache, token_B, self.task.prompt_length)

    def advance(self, state: State[Cache, Array]) -> State[Cache, Array]:
        """Start one step."""
        logits_BV, cache = self.step(state)
        return State(cache, self.arrays.greedy(logits_BV), state.length + 1)

    def wait(self, state: State[Cache, Array]) -> None:
        """Block until the state is computed."""
        self.arrays.wait(state)

    def logits_along(self, tokens_BG: np.ndarray) -> Iterator[np.ndarray]:
        """Yield logits (B, V) after the prompt, and after each of these tokens but the last."""
        yield self.arrays.on_host(self.after_prompt[0])
        state = self.start()
        for token_B in tokens_BG.T[:-1]:
            state = state._replace(token_B=self.arrays.tokens(token_B, self.task.device))
            logits_BV, cache = self.step(state)
            state = State(cache, state.token_B, state.length + 1)
            yield self.arrays.on_host(logits_BV)

    def other(
        self,
        name: str,
        ran: str,
        step: Callable[[State[Cache, Array]], tuple[Array, Cache]],
        extra_weight_bytes: int | None,
    ) -> "StepDecoder[Cache, Array]":
        """Return another step after the same prompt, with a slot for every token of a round."""

        def read() -> tuple[Array, Cache]:
            logits_BV, cache = self.after_prompt
            return logits_BV, self.arrays.grow(cache, self.task.context)

        arrays, task = self.arrays, self.task
        return StepDecoder(name, ran, arrays, task, read, step, extra_weight_bytes, False)


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
