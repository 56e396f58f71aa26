"""Decoding: the cache goes in, a longer cache comes out. Read beside torch_gpt/decode.py.

Dimension key: B batch, T prompt tokens, P tokens of one pass, D embed dim, V vocab.
"""

import jax
import jax.numpy as jnp

from flax_gpt.cache import KVCache
from flax_gpt.metadata import check_counts
from flax_gpt.model import GPT


def prefill(
    model: GPT,
    tokens_BT: jax.Array,
    cache: KVCache,
    counts_B: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Append whole prompts, in one forward pass or in chunks, and score the next token.

    Args:
        model: of the cache.
        tokens_BT: prompts, or the next part of them over a warm cache.
        cache: left as it was, so one prompt can be continued twice.
        counts_B: real tokens per row, at least 1, the rest is padding on the right; None for T.
        chunk: tokens of a pass, which bounds the memory of the scores; None for all.

    Returns:
        Logits (B, V) after each row's last real token, and the cache with the prompts appended.

    Raises:
        ValueError: for an empty prompt, or one that does not fit.
    """
    check_counts(counts_B, *tokens_BT.shape, least=1)
    if chunk is not None and tokens_BT.shape[1] > chunk:
        return prefill_in_chunks(model, tokens_BT, cache, counts_B, chunk)
    x_BTD, longer = model.hidden(tokens_BT, cache, counts_B)
    assert longer is not None
    return model.unembed(last(x_BTD, counts_B))[:, 0], longer


def decode_step(model: GPT, tokens_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Append one token per row and score the next.

    Args:
        model: of the cache.
        tokens_B: the tokens to append, not yet in the cache.
        cache: left as it was; needs one free slot per row.

    Returns:
        Logits (B, V), and the cache with the tokens appended.
    """
    logits_B1V, longer = model(tokens_B[:, None], cache)
    assert longer is not None
    return logits_B1V[:, 0], longer


def prefill_in_chunks(
    model: GPT, tokens_BT: jax.Array, cache: KVCache, counts_B: jax.Array | None, chunk: int
) -> tuple[jax.Array, KVCache]:
    """Compute `prefill` in passes of `chunk` tokens each, the last one padded."""
    batch_size, num_tokens = tokens_BT.shape
    cache.check_capacity(num_tokens, counts_B, model.context_length)
    given = num_tokens if counts_B is None else counts_B
    counts_B = jnp.broadcast_to(jnp.asarray(given, jnp.int32), batch_size)
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, -num_tokens % chunk)))

    def append_chunk(carry, start):
        """Call the model once; keep the stream of each row's last call that had tokens for it."""
        cache, left_B, x_BPD, ends_B = carry
        taken_B = jnp.minimum(left_B, chunk)
        part_BP = jax.lax.dynamic_slice_in_dim(tokens_BT, start, chunk, axis=1)
        y_BPD, longer = model.hidden(part_BP, cache, taken_B)
        assert longer is not None
        x_BPD = jnp.where((taken_B > 0)[:, None, None], y_BPD, x_BPD)
        ends_B = jnp.where(taken_B > 0, taken_B, ends_B)
        return (longer, left_B - taken_B, x_BPD, ends_B), None

    # twin: jax compiles one chunk for all of them; torch takes one after the other.
    embedding = model.token_embedding.embedding[...]
    x_BPD = jnp.zeros((batch_size, chunk, embedding.shape[1]), embedding.dtype)
    starts = jnp.arange(0, tokens_BT.shape[1], chunk)
    carry = cache, counts_B, x_BPD, counts_B
    (cache, _, x_BPD, ends_B), _ = jax.lax.scan(append_chunk, carry, starts)
    return model.unembed(last(x_BPD, ends_B))[:, 0], cache


def score_uncached(model: GPT, tokens_BT: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Score the next token from whole sequences, as the reference for all caches.

    Args:
        model: scores them.
        tokens_BT: sequences, padded on the right.
        counts_B: real tokens per row.

    Returns:
        Logits (B, V) after each row's last real token.
    """
    x_BTD, _ = model.hidden(tokens_BT, None, counts_B)
    return model.unembed(last(x_BTD, counts_B))[:, 0]


def last(x: jax.Array, counts_B: jax.Array | None) -> jax.Array:
    """Return what x (B, T, ...) holds at each row's last real token, (B, 1, ...)."""
    if counts_B is None:
        return x[:, -1:]
    return jnp.take_along_axis(x, (counts_B - 1)[:, None, None], axis=1)
