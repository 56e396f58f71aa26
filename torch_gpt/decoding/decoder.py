"""Prefill and step made fast: weights laid out, programs compiled, a cache that grows.

Read beside flax_gpt/decoding/decoder.py.

Dimension key: B batch, T prompt tokens, V vocab.
"""

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.config import GPTConfig
from torch_gpt.decode import decode_step, prefill, score_uncached
from torch_gpt.decoding.packing import PackedGPT, choose_kernels, pack
from torch_gpt.model import GPT

Function = Callable[..., Any]

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
        self._device = model.token_embedding.weight.device
        self._replay: _Replay | None = None
        self._known: tuple[torch.Tensor | None, int] = None, 0

    @property
    def extra_bytes(self) -> int:
        """Bytes of the weights that it holds beside the model's own."""
        return self.model.extra_bytes if isinstance(self.model, PackedGPT) else 0

    @staticmethod
    def num_compilations() -> int:
        """Return how many programs the decoders of this process have compiled."""
        return _Replay.num_compiled

    def prefill(
        self,
        tokens_BT: torch.Tensor | np.ndarray,
        counts_B: torch.Tensor | np.ndarray | None = None,
        capacity: int | None = None,
        chunk: int | None = None,
    ) -> tuple[torch.Tensor, KVCache]:
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
        tokens_BT = torch.as_tensor(tokens_BT, device=self._device).long()
        batch_size, num_tokens = tokens_BT.shape
        if counts_B is not None:
            counts_B = torch.as_tensor(counts_B, device=self._device).long()
        longest = num_tokens if counts_B is None else int(counts_B.max())
        capacity = capacity or capacity_for(longest + 1, self.config)
        if longest > min(capacity, self.config.context_length):
            raise ValueError(
                f"Decoder.prefill: {longest} tokens, capacity {capacity}, context_length "
                f"{self.config.context_length}. A prompt fits into both. Cut it or make more room."
            )
        cache = self.steps.empty(self.config, batch_size, capacity, device=self._device)
        logits_BV, cache = self.steps.prefill(self.model, tokens_BT, cache, counts_B, chunk)
        self._known = cache.lengths_B, longest
        return logits_BV, cache

    def advance(self, tokens_B: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, KVCache]:
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
        if self._device.type == "cpu" or self.steps is not Decoder.steps:
            logits_BV, cache = self.steps.decode_step(self.model, tokens_B, cache)
        else:
            if self._replay is None or not self._replay.can_take(cache):
                self._replay = _Replay(self.model, cache)
            logits_BV, cache = self._replay(tokens_B, cache)
        self._known = cache.lengths_B, longest
        return logits_BV, cache

    def _longest(self, cache: KVCache) -> int:
        """Return the longest row's length; ask the device only for a cache made elsewhere."""
        lengths_B, longest = self._known
        return longest if lengths_B is cache.lengths_B else int(cache.lengths_B.max())


def capacity_for(num_tokens: int, config: GPTConfig, least: int = _SMALLEST_CAPACITY) -> int:
    """Return a capacity for `num_tokens` within the context: a power of two, so there are few."""
    return min(max(1 << (num_tokens - 1).bit_length(), least), config.context_length)


class _Replay:
    """One step, compiled, which writes into buffers of its own; on CUDA one graph is replayed.

    A graph reads and writes the same memory every time, so the buffers stay where they are, and
    the caches that it returns are views of them. It goes on from the last of these. Another is
    copied in first, which is only allowed when no other cache sees the buffers any more.

    Args:
        model: on its device.
        cache: of the batch size, capacity and dtype to come.
        backend: of torch.compile.

    Attributes:
        num_compiled: steps that this process has compiled.
    """

    num_compiled = 0

    def __init__(self, model: GPT, cache: KVCache, backend: str = "inductor"):
        _Replay.num_compiled += 1
        self._model = model
        self._tokens_B = torch.zeros_like(cache.lengths_B)
        self._lengths_B = torch.zeros_like(cache.lengths_B)
        self._keys = [torch.zeros_like(layer.keys_BKSH) for layer in cache.layers]
        self._values = [torch.zeros_like(layer.values_BKSH) for layer in cache.layers]
        self._newest: Callable[[], torch.Tensor | None] = lambda: None
        self._view: Callable[[], torch.Tensor | None] = lambda: None
        options: dict[str, str | int | bool | Callable[..., Any]] | None = None
        if cache.lengths_B.is_cuda:
            # Makes products of one row loops, into which masks and casts can be fused.
            options = {"coordinate_descent_tuning": True}
        step = torch.compile(_step, fullgraph=True, dynamic=False, backend=backend, options=options)
        self._run: Callable[[], torch.Tensor] = lambda: step(
            self._model, self._tokens_B, self._lengths_B, self._keys, self._values
        )
        if cache.lengths_B.is_cuda:
            self._run = _captured(self._run)

    def can_take(self, cache: KVCache) -> bool:
        """Tell whether a step from this cache would harm no other one."""
        if cache.layers[0].keys_BKSH.shape != self._keys[0].shape:
            return False
        return cache.lengths_B is self._newest() or self._view() is None

    def __call__(self, tokens_B: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, KVCache]:
        """Compute `decode_step`; the cache must be one that it can take, with a free slot."""
        if cache.lengths_B is self._newest():
            layers = cache.layers
        else:
            for layer, keys, values in zip(cache.layers, self._keys, self._values, strict=True):
                keys.copy_(layer.keys_BKSH)
                values.copy_(layer.values_BKSH)
            layers = tuple(
                LayerCache(keys.view_as(keys), values.view_as(values))
                for keys, values in zip(self._keys, self._values, strict=True)
            )
            self._view = weakref.ref(layers[0].keys_BKSH)
        self._tokens_B.copy_(tokens_B)
        self._lengths_B.copy_(cache.lengths_B)
        logits_BV = self._run().clone()  # the next replay writes over it
        longer = KVCache(layers, cache.lengths_B + 1)
        self._newest = weakref.ref(longer.lengths_B)
        return logits_BV, longer


def _step(
    model: GPT,
    tokens_B: torch.Tensor,
    lengths_B: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Compute `decode_step` on buffers that it may write to."""
    pairs = zip(keys, values, strict=True)
    layers = tuple(LayerCache(*pair)._owned(lengths_B) for pair in pairs)
    return decode_step(model, tokens_B, KVCache(layers, lengths_B))[0]


def _captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return the same work as one CUDA graph, whose result is always in the same place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries allocate what they keep
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay
