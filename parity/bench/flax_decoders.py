"""The flax twin's decoding in each of its forms. Read beside parity/bench/torch_decoders.py."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_gpt
from flax_gpt.decoding.decoder import capacity_for
from parity.bench.contenders import Cell, Turn, garbage_like
from parity.frameworks.flax.scope import jax_scope


class FlaxSteps:
    """flax_gpt.Decoder.step in a Python loop, with the choice on the device.

    Args:
        model: the twin.
        cell: what is decoded.
        capacity: slots of the cache; None for what the decoder takes.
    """

    name = "flax step"
    framework = "flax"
    form = "cached"
    ran = "Decoder.step in a Python loop: one compiled program per step, its cache donated"
    reads = True

    def __init__(self, model: nnx.Module, cell: Cell, capacity: int | None = None):
        self._cell, self._capacity = cell, capacity
        with self._scope():
            self._decoder = flax_gpt.Decoder(model, cell.batch_size)
            self._prompt_BT = jnp.asarray(cell.prompt_BT)
            self._choose = jax.jit(_greedy)
        self.extra_bytes = self._decoder.extra_bytes
        self._behind = self._logits_BV = None
        self._littered = False

    @property
    def model(self) -> nnx.Module:
        """The twin with its weights laid out for the steps."""
        return self._decoder.model

    def prefill(self) -> None:
        """Decoder.prefill, one compiled program."""
        with self._scope():
            self._logits_BV = self._behind = None  # their memory can be taken again
            self._littered = False
            self._logits_BV, self._behind = jax.block_until_ready(
                self._decoder.prefill(self._prompt_BT, capacity=self._capacity)
            )

    def turn(self, num_steps: int) -> Turn:
        """Steps, and the first token of each turn from the prompt."""
        with self._scope():
            state = self.state()
            found = [state[1]]
            start = time.perf_counter()
            for _ in range(num_steps):
                state = self._advanced(*state)
                found.append(state[1])
            self.wait(state)
            seconds = time.perf_counter() - start
            return Turn(np.stack([np.asarray(x) for x in found], axis=1), seconds)

    def advance(self, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        """The cache and the chosen token a step later."""
        with self._scope():
            return self._advanced(*state)

    def wait(self, state: tuple[Any, jax.Array]) -> None:
        """Until cache and token are there."""
        jax.block_until_ready(state)

    def state(self) -> tuple[Any, jax.Array]:
        """A copy of the cache behind the prompt, garbage in its free slots, and the first token."""
        with self._scope():
            if not self._littered:
                self._behind, self._littered = flax_littered(self._behind, self._cell), True
            cache = jax.tree.map(jnp.copy, self._behind)
            return jax.block_until_ready((cache, self._choose(self._logits_BV)))

    @property
    def cache(self) -> Any:
        """The cache behind the prompt."""
        return self._behind

    def program(self) -> jax.stages.Compiled:
        """The program of a step behind the prompt, to look into."""
        with self._scope():
            shapes = jax.eval_shape(lambda: self._behind)
            tokens_B = jax.ShapeDtypeStruct((self._cell.batch_size,), jnp.int32)
            return self._decoder.program(flax_gpt.decode_step, tokens_B, state=shapes)

    def logits_along(self, tokens_BG: np.ndarray) -> Iterator[np.ndarray]:
        """Logits (B, V) behind the prompt, and behind each of these tokens but the last."""
        with self._scope():
            yield np.asarray(self._logits_BV, np.float32)
            cache, _ = self.state()
            for token_B in tokens_BG.T[:-1]:
                logits_BV, cache = self._decoder.advance(jnp.asarray(token_B, jnp.int32), cache)
                yield np.asarray(logits_BV, np.float32)

    def _advanced(self, cache: Any, token_B: jax.Array) -> tuple[Any, jax.Array]:
        logits_BV, cache = self._decoder.advance(token_B, cache)
        return cache, self._choose(logits_BV)

    def _scope(self) -> Any:
        return jax_scope(self._cell.config.dtype, self._cell.devices.flax)


class FlaxLoop:
    """flax_gpt.generate: all steps in one compiled loop, behind a prompt that has been read.

    Args:
        cell: what is decoded.
        reader: has the weights as they lie for its steps.
    """

    name = "flax loop"
    framework = "flax"
    form = "loop"
    ran = "generate(Decoder) behind its prompt: all steps in one compiled loop, its cache donated"
    reads = False

    def __init__(self, cell: Cell, reader: FlaxSteps):
        self._cell = cell
        with jax_scope(cell.config.dtype, cell.devices.flax):
            self._decoder = _ReadsAhead(reader.model, cell.batch_size)
            self._prompt_BT = jnp.asarray(cell.prompt_BT)
        self.extra_bytes = reader.extra_bytes

    def prefill(self) -> None:
        """Decoder.prefill, which `generate` calls first of all."""
        with jax_scope(self._cell.config.dtype, self._cell.devices.flax):
            self._decoder.read(self._prompt_BT, self._cell)

    def turn(self, num_steps: int) -> Turn:
        """The clock sees what `generate` does beside reading the prompt."""
        with jax_scope(self._cell.config.dtype, self._cell.devices.flax):
            self._decoder.rewind()
            start = time.perf_counter()
            generation = flax_gpt.generate(self._decoder, self._prompt_BT, num_steps + 1)
            tokens_BG = jax.block_until_ready(generation.tokens_BG)
            seconds = time.perf_counter() - start
            return Turn(np.asarray(tokens_BG), seconds)


class _ReadsAhead(flax_gpt.Decoder):
    """A decoder that has read the prompt before `generate` asks it to."""

    def read(self, prompt_BT: jax.Array, cell: Cell) -> None:
        """Reads the prompt, into as much room as `generate` wants for a full turn."""
        capacity = capacity_for(cell.context, cell.config)
        logits_BV, cache = super().prefill(prompt_BT, capacity=capacity)
        self._behind = jax.block_until_ready((logits_BV, flax_littered(cache, cell)))

    def rewind(self) -> None:
        """Makes a copy of all that was read, to be used up."""
        self._copy = jax.block_until_ready(jax.tree.map(jnp.copy, self._behind))

    def prefill(self, *_: Any, **__: Any) -> Any:
        """What was read before."""
        return self._copy


class FlaxUncached:
    """flax_gpt.generate without a cache.

    Args:
        model: the twin.
        cell: what is decoded.
    """

    name = "flax uncached"
    framework = "flax"
    form = "uncached"
    ran = "generate(use_cache=False): one compiled loop, every token from the whole sequence"
    reads = False
    extra_bytes = 0

    def __init__(self, model: nnx.Module, cell: Cell):
        self._cell = cell
        with jax_scope(cell.config.dtype, cell.devices.flax):
            self._decoder = flax_gpt.Decoder(model, cell.batch_size, packed=False)
            self._prompt_BT = jnp.asarray(cell.prompt_BT)

    def prefill(self) -> None:
        """Nothing is kept, so nothing is read ahead."""

    def turn(self, num_steps: int) -> Turn:
        """Time is by token: the first costs as much as every other."""
        with jax_scope(self._cell.config.dtype, self._cell.devices.flax):
            start = time.perf_counter()
            generation = flax_gpt.generate(
                self._decoder, self._prompt_BT, num_steps + 1, use_cache=False
            )
            tokens_BG = np.asarray(jax.block_until_ready(generation.tokens_BG))
            seconds = time.perf_counter() - start
        return Turn(tokens_BG, seconds * num_steps / (num_steps + 1))


def flax_littered(cache: Any, cell: Cell) -> Any:
    """A copy of a cache behind a cell's prompt, with garbage in its free slots.

    Zeros that nobody has written are one page of memory over and over, which is read from the
    processor's own cache, and a leak from free slots would not be seen.
    """

    def litter(slots: jax.Array) -> jax.Array:
        if slots.ndim != 4:
            return jnp.copy(slots)
        garbage = jnp.asarray(garbage_like(slots.shape), slots.dtype)
        return slots.at[:, :, cell.prompt_length :].set(garbage[:, :, cell.prompt_length :])

    return jax.tree.map(litter, cache)


def _greedy(logits_BV: jax.Array) -> jax.Array:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
