"""The Flax twin's cached decoding: step by step, as one loop, and as people first write it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_gpt
from flax_gpt.attention import attend
from flax_gpt.decoding.decoder import capacity_for
from parity.bench.decoders.protocol import Arrays, DecodeTask, TimedTokens, noise_like
from parity.bench.decoders.twins import StepDecoder

FlaxStep = StepDecoder[flax_gpt.KVCache, jax.Array]


def _on_host(array: jax.Array) -> np.ndarray:
    found = np.asarray(array)
    return found if found.dtype.kind == "i" else found.astype(np.float32)


def _copy(cache: flax_gpt.KVCache) -> flax_gpt.KVCache:
    return jax.tree.map(jnp.copy, cache)


def _with_noise(cache: flax_gpt.KVCache, length: int) -> flax_gpt.KVCache:
    def fill(slots: jax.Array) -> jax.Array:
        if slots.ndim != 4:
            return jnp.copy(slots)
        noise = jnp.asarray(noise_like(slots.shape), slots.dtype)
        return slots.at[:, :, length:].set(noise[:, :, length:])

    return jax.tree.map(fill, cache)


FLAX = Arrays(
    framework="flax",
    tokens=lambda token_B, device: jnp.asarray(token_B, jnp.int32),  # jax's default device
    greedy=jax.jit(lambda logits_BV: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)),
    on_host=_on_host,
    copy=_copy,
    with_noise=_with_noise,
    grow=lambda cache, slots: cache if cache.capacity >= slots else cache.grow(slots),
    wait=jax.block_until_ready,
)


def flax_step(decoder: flax_gpt.Decoder, task: DecodeTask, capacity: int | None = None) -> FlaxStep:
    """Return a decoder's `advance`; `capacity` are the slots of its cache, None for its default."""
    prompt_BT = jnp.asarray(task.prompt_BT)
    return StepDecoder(
        "flax step",
        "Decoder.advance in a Python loop: one compiled program per step, its cache donated",
        FLAX,
        task,
        lambda: decoder.prefill(prompt_BT, capacity=capacity),
        lambda state: decoder.advance(state.token_B, state.cache),
        decoder.extra_bytes,
    )


def flax_naive(model: flax_gpt.GPT, reader: FlaxStep) -> FlaxStep:
    """Return flax_gpt.decode_step under a plain `jax.jit`, as people first write it."""
    graphdef, parameters = nnx.split(model.with_attend(attend))

    def step(
        parameters: nnx.State, token_B: jax.Array, cache: flax_gpt.KVCache
    ) -> tuple[jax.Array, flax_gpt.KVCache]:
        return flax_gpt.decode_step(nnx.merge(graphdef, parameters), token_B, cache)

    program = jax.jit(step, donate_argnums=2)
    ran = (
        "decode_step with the defining attention, over the whole capacity, under jax.jit with its "
        "cache donated; no compiler option, no packed weights"
    )
    return reader.other("flax naive", ran, lambda x: program(parameters, x.token_B, x.cache), 0)


def step_program(decoder: flax_gpt.Decoder, cache: flax_gpt.KVCache) -> jax.stages.Compiled:
    """Return the compiled program of a step from a cache."""
    shapes = jax.eval_shape(lambda: cache)
    tokens_B = jax.ShapeDtypeStruct((cache.batch_size,), jnp.int32)
    return decoder.program(flax_gpt.decode_step, tokens_B, state=shapes)


class FlaxLoop:
    """flax_gpt.generate: all steps in one compiled loop, after a prompt that has been read.

    Args:
        decoder: has the weights as they lie for its steps.
        task: what is decoded.
    """

    name = "flax loop"
    form = "loop"
    ran = "generate(Decoder) after its prompt: all steps in one compiled loop, its cache donated"
    reads_prompt = False

    def __init__(self, decoder: flax_gpt.Decoder, task: DecodeTask):
        self.extra_weight_bytes: int | None = decoder.extra_bytes
        self._prompt_BT = jnp.asarray(task.prompt_BT)
        self._decoder = _PrefilledDecoder(decoder.model, task)

    def prefill(self) -> None:
        """Run Decoder.prefill, which `generate` calls first."""
        self._decoder.read()

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Time what `generate` does after it has read the prompt."""
        self._decoder.rewind()
        start = time.perf_counter()
        generation = flax_gpt.generate(self._decoder, self._prompt_BT, num_steps + 1)
        jax.block_until_ready(generation.tokens_BG)
        seconds = time.perf_counter() - start
        return TimedTokens(np.asarray(generation.tokens_BG), seconds)


class _PrefilledDecoder(flax_gpt.Decoder):
    """A decoder that has read the prompt before `generate` asks for it."""

    def __init__(self, model: flax_gpt.GPT, task: DecodeTask):
        super().__init__(model, task.batch_size)
        self._task = task

    def read(self) -> None:
        """Read the prompt into a cache of the capacity that `generate` wants for a full round."""
        capacity = capacity_for(self._task.context, self.config)
        logits_BV, cache = super().prefill(jnp.asarray(self._task.prompt_BT), capacity=capacity)
        cache = _with_noise(cache, self._task.prompt_length)
        self._read = jax.block_until_ready((logits_BV, cache))

    def rewind(self) -> None:
        """Copy what was read, to be consumed."""
        self._copy = jax.block_until_ready(jax.tree.map(jnp.copy, self._read))

    def prefill(self, *_: object, **__: object) -> tuple[jax.Array, flax_gpt.KVCache]:
        """Return what was read before."""
        return self._copy
