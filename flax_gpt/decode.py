"""Decoding: the cache goes in, a longer cache comes out. Read beside torch_gpt/decode.py.

Dimension key: B batch, T prompt tokens, P tokens of one pass, D embed dim, V vocab.
"""

import jax
import jax.numpy as jnp

from flax_gpt.cache import EXACT_TOKENS, KVCache
from flax_gpt.model import GPT
from flax_gpt.positions import check_counts


def prefill(
    model: GPT,
    tokens_BT: jax.Array,
    cache: KVCache,
    counts_B: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Reads whole prompts, in one forward pass or in chunks.

    Args:
        tokens_BT: prompts, or the next part of them over a warm cache.
        cache: left as it was, so one prompt can be continued twice.
        counts_B: real tokens per row, at least 1, the rest is padding on the right; None for T.
        chunk: tokens of a pass, which bounds the memory of the scores; None for all. An exact cache
            has its own.

    Returns:
        Logits (B, V) behind each row's last real token, and the cache with the prompts in it.

    Raises:
        ValueError: for an empty prompt, or one that does not fit.
    """
    check_counts(counts_B, *tokens_BT.shape, least=1)
    batch_size, num_tokens = tokens_BT.shape
    if not cache.exact and (chunk is None or num_tokens <= chunk):
        x_BTD, cache = model.hidden(tokens_BT, cache, counts_B)
        return model.unembed(last(x_BTD, counts_B))[:, 0], cache
    cache.check_room(num_tokens, counts_B, model.config.context_length)
    counts_B = num_tokens if counts_B is None else counts_B
    counts_B = jnp.broadcast_to(jnp.asarray(counts_B, jnp.int32), batch_size)
    if cache.exact:
        chunk = EXACT_TOKENS
        tokens_BT = _shifted(tokens_BT, cache.lengths_B % chunk, chunk - 1)
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, -tokens_BT.shape[1] % chunk)))

    def read_chunk(carry, start):
        """One call, and for every row the stream of the last call that had tokens for it."""
        cache, left_B, x_BPD, ends_B = carry
        before_B = cache.lengths_B % chunk if cache.exact else 0
        taken_B = jnp.minimum(left_B, chunk - before_B)
        part_BP = jax.lax.dynamic_slice_in_dim(tokens_BT, start, chunk, axis=1)
        y_BPD, cache = model.hidden(part_BP, cache, taken_B)
        x_BPD = jnp.where((taken_B > 0)[:, None, None], y_BPD, x_BPD)
        ends_B = jnp.where(taken_B > 0, before_B + taken_B, ends_B)
        return (cache, left_B - taken_B, x_BPD, ends_B), None

    # twin: jax compiles one chunk for all of them; torch takes one after the other.
    embedding = model.token_embedding.embedding[...]
    x_BPD = jnp.zeros((batch_size, chunk, embedding.shape[1]), embedding.dtype)
    starts = jnp.arange(0, tokens_BT.shape[1], chunk)
    (cache, _, x_BPD, ends_B), _ = jax.lax.scan(
        read_chunk, (cache, counts_B, x_BPD, counts_B), starts
    )
    if cache.exact:
        return last(model.unembed(x_BPD), ends_B)[:, 0], cache
    return model.unembed(last(x_BPD, ends_B))[:, 0], cache


def decode_step(model: GPT, tokens_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Appends one token per row and scores the next.

    Args:
        tokens_B: the tokens to append, not yet in the cache.
        cache: left as it was; needs one free slot per row.

    Returns:
        Logits (B, V), and the cache with the tokens in it.
    """
    if cache.exact:
        return prefill(model, tokens_B[:, None], cache)
    logits_B1V, cache = model(tokens_B[:, None], cache)
    return logits_B1V[:, 0], cache


def last(x: jax.Array, counts_B: jax.Array | None) -> jax.Array:
    """What stands at each row's last real token, (B, 1, ...) of (B, T, ...)."""
    if counts_B is None:
        return x[:, -1:]
    return jnp.take_along_axis(x, (counts_B - 1)[:, None, None], axis=1)


def _shifted(tokens_BT: jax.Array, by_B: jax.Array, most: int) -> jax.Array:
    """Each row moved to the right by its own number of places, of which there are so many."""
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, most)))
    columns_BT = jnp.arange(tokens_BT.shape[1])[None, :] - by_B[:, None]
    return jnp.take_along_axis(tokens_BT, jnp.maximum(columns_BT, 0), axis=1)
