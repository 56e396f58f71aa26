"""Decoding: the cache goes in, a longer cache comes out. Read beside flax_gpt/decode.py.

Dimension key: B batch, T prompt tokens, P tokens of one pass, D embed dim, V vocab.
"""

import torch
from torch.nn import functional as F

from torch_gpt.cache import EXACT_TOKENS, KVCache
from torch_gpt.model import GPT
from torch_gpt.positions import check_counts


@torch.no_grad()
def prefill(
    model: GPT,
    tokens_BT: torch.Tensor,
    cache: KVCache,
    counts_B: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, KVCache]:
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
    counts_B = torch.as_tensor(counts_B, device=tokens_BT.device).broadcast_to(batch_size)
    if cache.exact:
        chunk = EXACT_TOKENS
        tokens_BT = _shifted(tokens_BT, cache.lengths_B % chunk, chunk - 1)
    tokens_BT = F.pad(tokens_BT, (0, -tokens_BT.shape[1] % chunk))

    def read_chunk(carry, start):
        """One call, and for every row the stream of the last call that had tokens for it."""
        cache, left_B, x_BPD, ends_B = carry
        before_B = cache.lengths_B % chunk if cache.exact else 0
        taken_B = torch.clip(left_B, max=chunk - before_B)
        part_BP = tokens_BT[:, start : start + chunk]
        y_BPD, cache = model.hidden(part_BP, cache, taken_B)
        x_BPD = torch.where((taken_B > 0)[:, None, None], y_BPD, x_BPD)
        ends_B = torch.where(taken_B > 0, before_B + taken_B, ends_B)
        return cache, left_B - taken_B, x_BPD, ends_B

    # twin: jax compiles one chunk for all of them; torch takes one after the other.
    embedding = model.token_embedding.weight
    x_BPD = embedding.new_zeros(batch_size, chunk, embedding.shape[1])
    carry = cache, counts_B, x_BPD, counts_B
    for start in range(0, tokens_BT.shape[1], chunk):
        carry = read_chunk(carry, start)
    cache, _, x_BPD, ends_B = carry
    if cache.exact:
        return last(model.unembed(x_BPD), ends_B)[:, 0], cache
    return model.unembed(last(x_BPD, ends_B))[:, 0], cache


@torch.no_grad()
def decode_step(model: GPT, tokens_B: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, KVCache]:
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


def last(x: torch.Tensor, counts_B: torch.Tensor | None) -> torch.Tensor:
    """What stands at each row's last real token, (B, 1, ...) of (B, T, ...)."""
    if counts_B is None:
        return x[:, -1:]
    return torch.take_along_dim(x, (counts_B - 1)[:, None, None], dim=1)


def _shifted(tokens_BT: torch.Tensor, by_B: torch.Tensor, most: int) -> torch.Tensor:
    """Each row moved to the right by its own number of places, of which there are so many."""
    tokens_BT = F.pad(tokens_BT, (0, most))
    columns_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None, :] - by_B[:, None]
    return torch.take_along_dim(tokens_BT, columns_BT.clamp(min=0), dim=1)
