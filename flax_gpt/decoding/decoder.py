"""Prefill and step as they run fast: weights laid out, programs compiled, a cache that grows.

Read beside torch_gpt/decoding/decoder.py.

Dimension key: B batch, T prompt tokens, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from flax_gpt.cache import KVCache
from flax_gpt.config import GPTConfig
from flax_gpt.decode import decode_step, prefill
from flax_gpt.decoding.packing import PackedGPT, pack
from flax_gpt.model import GPT
from flax_gpt.positions import read

_LEAST_ROOM = 256  # slots; a smaller cache saves nothing


class Decoder:
    """A model made ready to decode batches of one size.

    Args:
        model: read now; later changes of its weights do not reach the decoder.
        batch_size: B, rows of a step.
        packed: whether to lay the weights out for it, where that is known to be faster.

    Attributes:
        model: the same function, with its weights laid out.
        config: of the model.
    """

    # twin: jax compiles a program for each batch size, capacity and prompt length rounded up; torch
    # runs operation by operation on a CPU, and on a GPU replays a graph of a step.

    def __init__(self, model: GPT, batch_size: int, packed: bool = True):
        self.model = pack(model, batch_size) if packed else model
        self.config = model.config
        self._graphdef, parameters = nnx.split(self.model)
        # Flat, because walking an nnx.State takes longer than a step of a small model.
        self._leaves, self._tree = jax.tree.flatten(parameters)
        self._known: tuple[jax.Array | None, int] = None, 0

    @property
    def extra_bytes(self) -> int:
        """Memory of the weights that it holds beside the model's own."""
        return self.model.extra_bytes if isinstance(self.model, PackedGPT) else 0

    def prefill(
        self,
        tokens_BT: jax.Array,
        counts_B: jax.Array | None = None,
        capacity: int | None = None,
        chunk: int | None = None,
        exact: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Reads prompts into a new cache; see `decode.prefill`.

        Args:
            tokens_BT: prompts, padded on the right.
            counts_B: real tokens per prompt; None for T.
            capacity: slots of the cache; None for room as `room_for` has it.
            chunk: tokens of a pass; None for all.
            exact: see `KVCache`.

        Returns:
            Logits (B, V) behind each prompt, and the cache.

        Raises:
            ValueError: for prompts that do not fit.
        """
        tokens_BT = np.asarray(tokens_BT)
        batch_size, num_tokens = tokens_BT.shape
        counts_B = np.full(batch_size, num_tokens) if counts_B is None else np.asarray(counts_B)
        longest = int(counts_B.max())
        capacity = capacity or room_for(longest + 1, self.config)
        if longest > min(capacity, self.config.context_length):
            raise ValueError(
                f"Decoder.prefill: {longest} tokens, capacity {capacity}, context_length "
                f"{self.config.context_length}. A prompt fits into both. Cut it or make more room."
            )
        length = room_for(num_tokens, self.config, least=1)
        padded = np.zeros((batch_size, length), np.int32)
        padded[:, : min(num_tokens, length)] = tokens_BT[:, :length]
        static = capacity, chunk, exact
        logits_BV, cache = self.run(_prefill, padded, counts_B.astype(np.int32), static=static)
        self._known = cache.lengths_B, longest
        return logits_BV, cache

    def step(self, tokens_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Appends one token per row and scores the next; see `decode_step`.

        Args:
            tokens_B: the tokens to append.
            cache: doubled when it is full. Not to be used again: the longer one has its memory.

        Returns:
            Logits (B, V), and the cache with the tokens in it.

        Raises:
            ValueError: when a row would outgrow the context.
        """
        # twin: jax gives the memory away; in torch the cache may be used again, and is copied then.
        longest = self._longest(cache) + 1
        if longest > self.config.context_length:
            raise ValueError(
                f"Decoder.step: {longest - 1} tokens + 1 new = {longest} > context_length "
                f"{self.config.context_length}. Positions end there. Truncate the cache "
                "or build a longer context."
            )
        if longest > cache.capacity:
            cache = cache.grow(room_for(longest, self.config))
        logits_BV, cache = self.run(decode_step, tokens_B, state=cache)
        self._known = cache.lengths_B, longest
        return logits_BV, cache

    def run(
        self,
        function: Callable[..., Any],
        *operands: Any,
        state: Any = None,
        static: tuple[Any, ...] = (),
    ) -> Any:
        """What a function makes of the model, compiled once for every size.

        Args:
            function: called with the model, the operands, the state and the static arguments.
            operands: arrays, or trees of them.
            state: one more, which gives its memory to the result.
            static: arguments that the program is compiled for.
        """
        return _program()(*self._arguments(function, operands, state, static))

    def program(
        self,
        function: Callable[..., Any],
        *operands: Any,
        state: Any = None,
        static: tuple[Any, ...] = (),
    ) -> jax.stages.Compiled:
        """The program that `run` runs, to look into; of arrays, shapes and dtypes are enough."""
        return _program().lower(*self._arguments(function, operands, state, static)).compile()

    def _arguments(
        self,
        function: Callable[..., Any],
        operands: tuple[Any, ...],
        state: Any,
        static: tuple[Any, ...],
    ) -> tuple[Any, ...]:
        state = () if state is None else (state,)
        return function, self._graphdef, self._tree, static, self._leaves, operands, state

    def _longest(self, cache: KVCache) -> int:
        """Tokens in the longest row; asks the device only for a cache that it has not made last."""
        lengths_B, longest = self._known
        return longest if lengths_B is cache.lengths_B else int(np.max(read(cache.lengths_B)))


def room_for(num_tokens: int, config: GPTConfig, least: int = _LEAST_ROOM) -> int:
    """The capacity for so many tokens within the context: a power of two, so that there are few."""
    return min(max(1 << (num_tokens - 1).bit_length(), least), config.context_length)


@functools.cache
def _program() -> Callable[..., Any]:
    """`Decoder.run` under one `jax.jit` for all functions and sizes.

    XLA on a CPU copies what it will overwrite unless told to look whether anyone still reads it.
    """
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
    if jax.default_backend() != "cpu":
        options = {}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # a version that does not have it
        options = {}

    return jax.jit(_run, static_argnums=(0, 1, 2, 3), donate_argnums=6, compiler_options=options)


def _run(
    function: Callable[..., Any],
    graphdef: nnx.GraphDef,
    tree: jax.tree_util.PyTreeDef,
    static: tuple[Any, ...],
    leaves: list[jax.Array],
    operands: tuple[Any, ...],
    state: tuple[Any, ...],
) -> Any:
    model = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
    return function(model, *operands, *state, *static)


def _prefill(
    model: GPT,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    capacity: int,
    chunk: int | None,
    exact: bool,
) -> tuple[jax.Array, KVCache]:
    cache = KVCache.empty(model.config, len(counts_B), capacity, exact=exact)
    return prefill(model, tokens_BT, cache, counts_B, chunk)
