"""What the bench asks of a decoder, and how a decoder is timed.

`prefill` reads the prompt. `timed_steps` first restores the state after the prompt, which is not
timed, and then appends tokens. The first of its tokens is the one chosen from the prompt's logits;
each step appends a token to every row and chooses the next.

Dimension key: B batch, T prompt tokens, G generated tokens, V vocab.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

import flax_gpt

Cache = TypeVar("Cache")
Array = TypeVar("Array")


@dataclasses.dataclass(frozen=True)
class DecodeTask:
    """A prompt (B, T) to continue by `num_steps` tokens; `device` is torch's."""

    config: flax_gpt.GPTConfig
    prompt_BT: np.ndarray
    num_steps: int
    device: torch.device

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.prompt_BT.shape[0]

    @property
    def prompt_length(self) -> int:
        """Tokens of a row before the first step."""
        return self.prompt_BT.shape[1]

    @property
    def context(self) -> int:
        """Tokens of a row at the end of a full round."""
        return self.prompt_length + self.num_steps

    def __str__(self) -> str:
        return f"{self.config.dtype}, batch {self.batch_size}, context {self.context}"


@dataclasses.dataclass(frozen=True)
class TimedTokens:
    """Tokens (B, 1 + steps), the first of which is the prompt's, and the seconds of all steps."""

    tokens_BG: np.ndarray
    seconds: float


class Decoder(Protocol):
    """One way to decode.

    Attributes:
        name: in tables; its first word is the framework or library.
        form: cached, uncached, or loop if all steps are one call.
        ran: description of what is timed.
        reads_prompt: whether `prefill` reads the prompt; False if another decoder does so.
        extra_weight_bytes: memory of weights beside the twin's own; None if unknown.
    """

    name: str
    form: str
    ran: str
    reads_prompt: bool
    extra_weight_bytes: int | None

    def prefill(self) -> None:
        """Read the prompt and wait for the result."""

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Append tokens to the prompt."""


class State(NamedTuple, Generic[Cache, Array]):
    """A cache, the token to append to it, and the tokens that every row holds."""

    cache: Cache
    token_B: Array
    length: int


class Stepwise(Protocol):
    """A decoder that can be stopped after each step."""

    def start(self) -> State:
        """Copy the state after the prompt, to be consumed by `advance`."""

    def advance(self, state: State) -> State:
        """Start one step; its result may not be computed yet."""

    def wait(self, state: State) -> None:
        """Block until the state is computed."""


@dataclasses.dataclass(frozen=True)
class Arrays(Generic[Cache, Array]):
    """A framework's operations on the arrays of a state.

    Attributes:
        framework: flax or torch.
        tokens: puts token ids on a device.
        greedy: chooses the most likely token of each row from logits (B, V).
        on_host: copies to the host, floats as float32.
        copy: copies a cache, with the right to write into its free slots.
        with_noise: copies a cache and fills its slots from a length on; see `noise_like`.
        grow: gives a cache a capacity of at least this many slots.
        wait: blocks until arrays, or trees of them, are computed.
    """

    framework: str
    tokens: Callable[[np.ndarray, torch.device], Array]
    greedy: Callable[[Array], Array]
    on_host: Callable[[Array], np.ndarray]
    copy: Callable[[Cache], Cache]
    with_noise: Callable[[Cache, int], Cache]
    grow: Callable[[Cache, int], Cache]
    wait: Callable[[object], object]


def timed_steps(decoder: Stepwise, arrays: Arrays, num_steps: int) -> TimedTokens:
    """Run one timed sequence of steps."""
    state = decoder.start()
    tokens = [state.token_B]
    decoder.wait(state)
    start = time.perf_counter()
    for _ in range(num_steps):
        state = decoder.advance(state)
        tokens.append(state.token_B)
    decoder.wait(state)
    seconds = time.perf_counter() - start
    return TimedTokens(np.stack([arrays.on_host(x) for x in tokens], axis=1), seconds)


def noise_like(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 numbers as large as keys and values are, to fill free slots of a cache.

    Zeros that were never written share one page of memory, which is read from the processor's own
    cache, and would hide a leak from free slots.
    """
    return np.resize(_NOISE, shape)


_NOISE = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
