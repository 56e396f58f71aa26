"""Decoding: the cache goes in, a longer cache comes out. Read beside flax_gpt/decode.py.

Dimension key: B batch, T prompt tokens, P tokens of one pass, D embed dim, V vocab.
"""

import torch
from torch.nn import functional as F

from torch_gpt.cache import KVCache
from torch_gpt.metadata import check_counts
from torch_gpt.model import GPT


@torch.no_grad()
def prefill(
    model: GPT,
    tokens_BT: torch.Tensor,
    cache: KVCache,
    counts_B: torch.Tensor | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor, KVCache]:
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


@torch.no_grad()
def decode_step(model: GPT, tokens_B: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, KVCache]:
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


@torch.no_grad()
def prefill_in_chunks(
    model: GPT, tokens_BT: torch.Tensor, cache: KVCache, counts_B: torch.Tensor | None, chunk: int
) -> tuple[torch.Tensor, KVCache]:
    """Compute `prefill` in passes of `chunk` tokens each, the last one padded."""
    batch_size, num_tokens = tokens_BT.shape
    cache.check_capacity(num_tokens, counts_B, model.context_length)
    given = num_tokens if counts_B is None else counts_B
    counts_B = torch.as_tensor(given, device=tokens_BT.device).broadcast_to(batch_size)
    tokens_BT = F.pad(tokens_BT, (0, -num_tokens % chunk))

    def append_chunk(carry, start):
        """Call the model once; keep the stream of each row's last call that had tokens for it."""
        cache, left_B, x_BPD, ends_B = carry
        taken_B = torch.clamp(left_B, max=chunk)
        part_BP = tokens_BT[:, start : start + chunk]
        y_BPD, longer = model.hidden(part_BP, cache, taken_B)
        assert longer is not None
        x_BPD = torch.where((taken_B > 0)[:, None, None], y_BPD, x_BPD)
        ends_B = torch.where(taken_B > 0, taken_B, ends_B)
        return longer, left_B - taken_B, x_BPD, ends_B

    # twin: jax compiles one chunk for all of them; torch takes one after the other.
    embedding = model.token_embedding.weight
    x_BPD = embedding.new_zeros(batch_size, chunk, embedding.shape[1])
    carry = cache, counts_B, x_BPD, counts_B
    for start in range(0, tokens_BT.shape[1], chunk):
        carry = append_chunk(carry, start)
    cache, _, x_BPD, ends_B = carry
    return model.unembed(last(x_BPD, ends_B))[:, 0], cache


@torch.no_grad()
def score_uncached(model: GPT, tokens_BT: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """Score the next token from whole sequences, as the reference for all caches.

    Args:
        model: scores them.
        tokens_BT: sequences, padded on the right.
        counts_B: real tokens per row.

    Returns:
        Logits (B, V) after each row's last real token.
    """
    tokens_BT = tokens_BT[:, : int(counts_B.max())]
    x_BTD, _ = model.hidden(tokens_BT, None, counts_B)
    return model.unembed(last(x_BTD, counts_B))[:, 0]


def last(x: torch.Tensor, counts_B: torch.Tensor | None) -> torch.Tensor:
    """Return what x (B, T, ...) holds at each row's last real token, (B, 1, ...)."""
    if counts_B is None:
        return x[:, -1:]
    return torch.take_along_dim(x, (counts_B - 1)[:, None, None], dim=1)
