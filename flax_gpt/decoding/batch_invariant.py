"""Decoding in which a token's numbers are the same to the last bit, however its row was cut.

Read beside torch_gpt/decoding/batch_invariant.py.

A sum of floats depends on the order of its terms, which depends on the shapes of a call. So every
call has NUM_TOKENS tokens, the token of slot s is always number s % NUM_TOKENS of its call, and
attention always sees all slots. Where a row ends inside such a block of slots, the next call
computes its tokens once more, together with the new ones. It costs more than `decode`.

Dimension key: B batch, T prompt tokens, P tokens of one call, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flax_gpt import attention
from flax_gpt.cache import KVCache
from flax_gpt.config import GPTConfig
from flax_gpt.decode import prefill_in_chunks
from flax_gpt.decoding.decoder import Decoder, Steps
from flax_gpt.metadata import check_counts
from flax_gpt.model import GPT

NUM_TOKENS = 16  # of every call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchInvariantCache:
    """Whole blocks of NUM_TOKENS slots, and the tokens of the block in which each row ends.

    Attributes:
        blocks: keys and values; its lengths are multiples of NUM_TOKENS.
        tokens_BP: ids of the tokens after them, padded on the right.
        lengths_B: tokens of each row, those in `tokens_BP` included.
    """

    blocks: KVCache
    tokens_BP: jax.Array
    lengths_B: jax.Array

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        batch_size: int,
        capacity: int,
        dtype: str | None = None,
        device: jax.Device | None = None,
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
        tokens_BP = jnp.zeros((batch_size, NUM_TOKENS), jnp.int32, device=device)
        return cls(blocks, tokens_BP, blocks.lengths_B)

    @property
    def capacity(self) -> int:
        """Slots allocated per row."""
        return self.blocks.capacity

    def grow(self, capacity: int) -> "BatchInvariantCache":
        """Return this cache with `capacity` slots per row; sums over them are others."""
        return dataclasses.replace(self, blocks=self.blocks.grow(capacity))


def prefill(
    model: GPT,
    tokens_BT: jax.Array,
    cache: BatchInvariantCache,
    counts_B: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, BatchInvariantCache]:
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
    counts_B = jnp.broadcast_to(jnp.asarray(given, jnp.int32), batch_size)
    # The tokens of each row's open block, and right after them the new ones.
    open_B = cache.lengths_B - cache.blocks.lengths_B
    joined = jnp.concatenate([cache.tokens_BP, jnp.asarray(tokens_BT, jnp.int32)], axis=1)
    columns = jnp.arange(joined.shape[1] - 1, dtype=jnp.int32)[None, :]
    order = jnp.where(columns < open_B[:, None], columns, columns - open_B[:, None] + NUM_TOKENS)
    tokens = jnp.take_along_axis(joined, jnp.minimum(order, joined.shape[1] - 1), axis=1)
    ends_B = open_B + counts_B
    model = model.with_attend(attention.attend)
    logits_BV, longer = prefill_in_chunks(model, tokens, cache.blocks, ends_B, NUM_TOKENS)
    full_B = ends_B // NUM_TOKENS * NUM_TOKENS
    order = jnp.minimum(full_B[:, None] + columns[:, :NUM_TOKENS], tokens.shape[1] - 1)
    # twin: the longer cache is nobody else's, so torch may write into its last block again.
    blocks = KVCache(longer.layers, cache.blocks.lengths_B + full_B)
    tokens_BP = jnp.take_along_axis(tokens, order, axis=1)
    return logits_BV, BatchInvariantCache(blocks, tokens_BP, cache.lengths_B + counts_B)


def decode_step(
    model: GPT, tokens_B: jax.Array, cache: BatchInvariantCache
) -> tuple[jax.Array, BatchInvariantCache]:
    """Append one token per row and score the next; see `decode.decode_step`."""
    return prefill(model, tokens_B[:, None], cache)


def score_uncached(model: GPT, tokens_BT: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Score the next token from whole sequences, T being the capacity of the cache to match."""
    batch_size, capacity = tokens_BT.shape
    cache = BatchInvariantCache.empty(model.config, batch_size, capacity)
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
