"""Prefill and step made fast: weights laid out, programs compiled, a cache that grows.

Read beside torch_gpt/decoding/decoder.py.

Dimension key: B batch, T prompt tokens, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from flax_gpt.cache import KVCache
from flax_gpt.config import GPTConfig
from flax_gpt.decode import decode_step, prefill, score_uncached
from flax_gpt.decoding.packing import PackedGPT, choose_kernels, pack
from flax_gpt.model import GPT

Function = Callable[..., Any]
_Result = TypeVar("_Result")

_SMALLEST_CAPACITY = 256  # slots; a smaller cache saves nothing


@dataclasses.dataclass(frozen=True)
class Steps:
    """The pure functions that a decoder runs, all on caches of one type.

    Attributes:
        empty: allocates a cache, as `KVCache.empty`.
        prefill: appends prompts, as `decode.prefill`.
        decode_step: appends one token per row, as `decode.decode_step`.
        score_uncached: scores whole sequences, as `decode.score_uncached`.
    """

    empty: Function
    prefill: Function
    decode_step: Function
    score_uncached: Function


class Decoder:
    """A model made ready to decode batches of one size.

    Args:
        model: read now; later changes of its weights do not reach the decoder.
        batch_size: B, rows of a step.
        packed: whether to lay the weights out for it.
        kernels: one of `KERNELS` to compute products with, wherever it can; None for those that
            are fastest here, which takes half a second where such products were not timed before.

    Attributes:
        model: the same function, with its weights laid out.
        kernels: the choice for each kind of product, and by how much; none where nothing is laid
            out.
        config: of the model.
        steps: what it runs.
    """

    steps = Steps(KVCache.empty, prefill, decode_step, score_uncached)

    # twin: jax compiles a program for each batch size, capacity and prompt length rounded up; torch
    # runs operation by operation on a CPU, and on a GPU replays a graph of a step.

    def __init__(
        self, model: GPT, batch_size: int, packed: bool = True, kernels: str | None = None
    ):
        self.kernels = choose_kernels(model, batch_size, kernels) if packed else ()
        self.model = pack(model, batch_size, self.kernels)
        self.config = model.config
        self._graphdef, parameters = nnx.split(self.model)
        # Flat, because walking an nnx.State takes longer than a step of a small model.
        self._leaves, self._tree = jax.tree.flatten(parameters)
        self._known: tuple[jax.Array | None, int] = None, 0

    @property
    def extra_bytes(self) -> int:
        """Bytes of the weights that it holds beside the model's own."""
        return self.model.extra_bytes if isinstance(self.model, PackedGPT) else 0

    @staticmethod
    def num_compilations() -> int:
        """Return how many programs the decoders of this process have compiled."""
        return _program()._cache_size()

    def prefill(
        self,
        tokens_BT: ArrayLike,
        counts_B: ArrayLike | None = None,
        capacity: int | None = None,
        chunk: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Append prompts to a new cache; see `decode.prefill`.

        Args:
            tokens_BT: prompts, padded on the right.
            counts_B: real tokens per prompt; None for T.
            capacity: slots of the cache; None for those of `capacity_for`.
            chunk: tokens of a pass; None for all.

        Returns:
            Logits (B, V) after each prompt, and the cache.

        Raises:
            ValueError: for prompts that do not fit.
        """
        tokens_BT = np.asarray(tokens_BT)
        batch_size, num_tokens = tokens_BT.shape
        counts_B = np.full(batch_size, num_tokens) if counts_B is None else np.asarray(counts_B)
        longest = int(counts_B.max())
        capacity = capacity or capacity_for(longest + 1, self.config)
        if longest > min(capacity, self.config.context_length):
            raise ValueError(
                f"Decoder.prefill: {longest} tokens, capacity {capacity}, context_length "
                f"{self.config.context_length}. A prompt fits into both. Cut it or make more room."
            )
        length = capacity_for(num_tokens, self.config, least=1)
        padded = np.zeros((batch_size, length), np.int32)
        padded[:, : min(num_tokens, length)] = tokens_BT[:, :length]
        static = capacity, chunk, self.steps
        logits_BV, cache = self.run(_prefill, padded, counts_B.astype(np.int32), static=static)
        self._known = cache.lengths_B, longest
        return logits_BV, cache

    def advance(self, tokens_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Append one token per row and score the next. Consumes its cache: use the one returned.

        `decode_step` is the same as a pure function, which leaves its cache as it was.

        Args:
            tokens_B: the tokens to append.
            cache: doubled when it is full. Not to be used again, its memory is that of the result.

        Returns:
            Logits (B, V), and the cache with the tokens appended.

        Raises:
            ValueError: when a row would outgrow the context.
        """
        # twin: jax gives the memory away; in torch the cache may be used again, and is copied then.
        longest = self._longest(cache) + 1
        if longest > self.config.context_length:
            raise ValueError(
                f"Decoder.advance: {longest - 1} tokens + 1 new = {longest} > context_length "
                f"{self.config.context_length}. Positions end there. Truncate the cache "
                "or build a longer context."
            )
        if longest > cache.capacity:
            cache = cache.grow(capacity_for(longest, self.config))
        logits_BV, cache = self.run(self.steps.decode_step, tokens_B, state=cache)
        self._known = cache.lengths_B, longest
        return logits_BV, cache

    def run(
        self,
        function: Callable[..., _Result],
        *operands: object,
        state: object = None,
        static: tuple[object, ...] = (),
    ) -> _Result:
        """Call a function on the model, compiled once for every size of its operands.

        Args:
            function: called with the model, the operands, the state and the static arguments.
            operands: arrays, or trees of them.
            state: one more operand, which gives its memory to the result.
            static: arguments that the program is compiled for.

        Returns:
            The function's result.
        """
        return _program()(*self._arguments(function, operands, state, static))

    def program(
        self,
        function: Function,
        *operands: object,
        state: object = None,
        static: tuple[object, ...] = (),
    ) -> jax.stages.Compiled:
        """Return the compiled program that `run` would execute; shapes may stand for arrays."""
        return _program().lower(*self._arguments(function, operands, state, static)).compile()

    def _arguments(
        self,
        function: Function,
        operands: tuple[object, ...],
        state: object,
        static: tuple[object, ...],
    ) -> tuple[object, ...]:
        state = () if state is None else (state,)
        return function, self._graphdef, self._tree, static, self._leaves, operands, state

    def _longest(self, cache: KVCache) -> int:
        """Return the longest row's length; ask the device only for a cache made elsewhere."""
        lengths_B, longest = self._known
        return longest if lengths_B is cache.lengths_B else int(cache.lengths_B.max())


def capacity_for(num_tokens: int, config: GPTConfig, least: int = _SMALLEST_CAPACITY) -> int:
    """Return a capacity for `num_tokens` within the context: a power of two, so there are few."""
    return min(max(1 << (num_tokens - 1).bit_length(), least), config.context_length)


@functools.cache
def _program() -> Any:
    """Return `Decoder.run` under one `jax.jit` for all functions and sizes.

    XLA on a CPU copies what it will overwrite unless asked to look whether it is still read.
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
    function: Callable[..., _Result],
    graphdef: nnx.GraphDef,
    tree: jax.tree_util.PyTreeDef,
    static: tuple[object, ...],
    leaves: list[jax.Array],
    operands: tuple[object, ...],
    state: tuple[object, ...],
) -> _Result:
    model = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
    return function(model, *operands, *state, *static)


def _prefill(
    model: GPT,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    capacity: int,
    chunk: int | None,
    steps: Steps,
) -> tuple[jax.Array, KVCache]:
    cache = steps.empty(model.config, len(counts_B), capacity)
    return steps.prefill(model, tokens_BT, cache, counts_B, chunk)
