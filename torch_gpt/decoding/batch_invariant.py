"""Decoding in which a token's numbers are the same to the last bit, however its row was cut.

Read beside flax_gpt/decoding/batch_invariant.py.

A sum of floats depends on the order of its terms, which depends on the shapes of a call. So every
call has NUM_TOKENS tokens, the token of slot s is always number s % NUM_TOKENS of its call, and
attention always sees all slots. Where a row ends inside such a block of slots, the next call
computes its tokens once more, together with the new ones. It costs more than `decode`.

Dimension key: B batch, T prompt tokens, P tokens of one call, V vocab.
"""

import dataclasses

import torch
from torch.utils import _pytree as pytree

from torch_gpt import attention
from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.config import GPTConfig
from torch_gpt.decode import prefill_in_chunks
from torch_gpt.decoding.decoder import Decoder, Steps
from torch_gpt.metadata import check_counts
from torch_gpt.model import GPT

NUM_TOKENS = 16  # of every call


@dataclasses.dataclass(frozen=True)
class BatchInvariantCache:
    """Whole blocks of NUM_TOKENS slots, and the tokens of the block in which each row ends.

    Attributes:
        blocks: keys and values; its lengths are multiples of NUM_TOKENS.
        tokens_BP: ids of the tokens after them, padded on the right.
        lengths_B: tokens of each row, those in `tokens_BP` included.
    """

    blocks: KVCache
    tokens_BP: torch.Tensor
    lengths_B: torch.Tensor

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        batch_size: int,
        capacity: int,
        dtype: str | None = None,
        device: torch.device | None = None,
    ) -> "BatchInvariantCache":
        """Allocate a cache of length 0 in every row; see `KVCache.empty`.

        Returns:
            The cache.

        Raises:
            ValueError: for a model of experts.
        """
        if config.experts is not None:
            raise ValueError(
                f"BatchInvariantCache: {config.experts.num_experts} experts. Each computes the "
                "tokens that chose it, as many as these are. Take Decoder."
            )
        blocks = KVCache.empty(config, batch_size, capacity, dtype, device)
        tokens_BP = torch.zeros((batch_size, NUM_TOKENS), dtype=torch.int64, device=device)
        return cls(blocks, tokens_BP, blocks.lengths_B)

    @property
    def capacity(self) -> int:
        """Slots allocated per row."""
        return self.blocks.capacity

    def grow(self, capacity: int) -> "BatchInvariantCache":
        """Return this cache with `capacity` slots per row; sums over them are others."""
        return dataclasses.replace(self, blocks=self.blocks.grow(capacity))


pytree.register_dataclass(BatchInvariantCache)


@torch.no_grad()
def prefill(
    model: GPT,
    tokens_BT: torch.Tensor,
    cache: BatchInvariantCache,
    counts_B: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, BatchInvariantCache]:
    """Append whole prompts and score the next token; see `decode.prefill`.

    The size of a chunk is NUM_TOKENS, whatever `chunk` says.

    Returns:
        Logits (B, V) after each row's last real token, and the cache with the prompts appended.

    Raises:
        ValueError: for an empty prompt, or one that does not fit.
    """
    batch_size, num_tokens = tokens_BT.shape
    check_counts(counts_B, batch_size, num_tokens, least=1)
    given = num_tokens if counts_B is None else counts_B
    counts_B = torch.as_tensor(given, device=tokens_BT.device).broadcast_to(batch_size)
    # The tokens of each row's open block, and right after them the new ones.
    open_B = cache.lengths_B - cache.blocks.lengths_B
    joined = torch.cat([cache.tokens_BP, tokens_BT], dim=1)
    columns = torch.arange(joined.shape[1] - 1, device=tokens_BT.device)[None, :]
    order = torch.where(columns < open_B[:, None], columns, columns - open_B[:, None] + NUM_TOKENS)
    tokens = torch.take_along_dim(joined, order.clamp(max=joined.shape[1] - 1), dim=1)
    ends_B = open_B + counts_B
    model = model.with_attend(attention.attend)
    logits_BV, longer = prefill_in_chunks(model, tokens, cache.blocks, ends_B, NUM_TOKENS)
    full_B = ends_B // NUM_TOKENS * NUM_TOKENS
    order = (full_B[:, None] + columns[:, :NUM_TOKENS]).clamp(max=tokens.shape[1] - 1)
    # twin: the longer cache is nobody else's, so torch may write into its last block again.
    lengths_B = cache.blocks.lengths_B + full_B
    pairs = [(layer.keys_BKSH, layer.values_BKSH) for layer in longer.layers]
    blocks = KVCache(tuple(LayerCache(*pair)._owned(lengths_B) for pair in pairs), lengths_B)
    tokens_BP = torch.take_along_dim(tokens, order, dim=1)
    return logits_BV, BatchInvariantCache(blocks, tokens_BP, cache.lengths_B + counts_B)


def decode_step(
    model: GPT, tokens_B: torch.Tensor, cache: BatchInvariantCache
) -> tuple[torch.Tensor, BatchInvariantCache]:
    """Append one token per row and score the next; see `decode.decode_step`."""
    return prefill(model, tokens_B[:, None], cache)


def score_uncached(model: GPT, tokens_BT: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Score the next token from whole sequences, T being the capacity of the cache to match."""
    (batch_size, capacity), device = tokens_BT.shape, tokens_BT.device
    cache = BatchInvariantCache.empty(model.config, batch_size, capacity, device=device)
    return prefill(model, tokens_BT, cache, counts_B)[0]


class BatchInvariantDecoder(Decoder):
    """A decoder whose numbers have the same bits in whatever calls the tokens came.

    `generate` takes it in place of a model, and writes the same with and without its cache. Its
    kernels are not chosen by time, or the bits would be others in another process.

    Args:
        model: see `Decoder`.
        batch_size: see `Decoder`.
        packed: see `Decoder`.
        kernels: see `Decoder`.
    """

    steps = Steps(BatchInvariantCache.empty, prefill, decode_step, score_uncached)

    def __init__(
        self, model: GPT, batch_size: int, packed: bool = True, kernels: str | None = "plain"
    ):
        super().__init__(model, batch_size, packed, kernels)
