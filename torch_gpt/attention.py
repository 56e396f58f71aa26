"""Attention over what the cache holds and over the new tokens: the definition.

Read beside flax_gpt/attention.py. `fast_attention` computes the same and reads less.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, H head
dim. A column is a slot of the cache or a new token. Query heads are grouped by the kv head that
they read, so keys and values are never repeated.

Written by hand, because the frameworks' fused attentions compute their softmax in float32, which
spoils float64. Here it is float32 for the 16-bit types and the compute dtype for others.
"""

import itertools
from collections.abc import Callable, Sequence

import torch

from torch_gpt.cache import LayerCache
from torch_gpt.layers import SoftCap, identity
from torch_gpt.metadata import AttentionMetadata
from torch_gpt.scores import softmax_with_sinks

Drop = Callable[[torch.Tensor], torch.Tensor]
Attend = Callable[
    [torch.Tensor, LayerCache, LayerCache | None, AttentionMetadata, Drop],
    tuple[torch.Tensor, LayerCache | None],
]  # the signature of `attend`


def attend(
    q_BKQTH: torch.Tensor,
    new: LayerCache,
    past: LayerCache | None,
    metadata: AttentionMetadata,
    drop: Drop = identity,
) -> tuple[torch.Tensor, LayerCache | None]:
    """Attend to the cached and the new tokens that `metadata.mask_BTS` shows.

    Slots that no query sees may hold anything, even NaN.

    Args:
        q_BKQTH: queries of the new tokens.
        new: their keys and values.
        past: keys and values of the tokens before them; None without a cache.
        metadata: of the call.
        drop: applied to the attention weights.

    Returns:
        Weighted values (B, K, Q, T, H), and `past` with the new tokens appended.
    """
    # twin: XLA copies a cache that is read after it was written, so jax attends to the slots and
    # to the tokens apart and writes last; torch writes first and reads one piece.
    mask_BTS = metadata.mask_BTS
    layer = None if past is None else past.append(new, metadata)
    parts = [new] if layer is None else zero_unattended([layer], mask_BTS)
    scores = metadata.bias_BKQTS, metadata.sinks_KQ, metadata.score_cap
    weights_BKQTS = drop(attention_weights(q_BKQTH, parts, mask_BTS, *scores))
    return weighted_values(weights_BKQTS, parts), layer


def attention_weights(
    q_BKQTH: torch.Tensor,
    parts: Sequence[LayerCache],
    mask_BTS: torch.Tensor,
    bias_BKQTS: torch.Tensor | None = None,
    sinks_KQ: torch.Tensor | None = None,
    score_cap: float | None = None,
) -> torch.Tensor:
    """Compute softmax(q k / sqrt(H) + bias) over the columns of all parts.

    Args:
        q_BKQTH: queries.
        parts: keys and values, which side by side are the S columns.
        mask_BTS: True where a query sees a column.
        bias_BKQTS: added to the scores; None for nothing.
        sinks_KQ: scores of one more column, which has no value; None for none.
        score_cap: that products do not reach; None for none.

    Returns:
        Weights (B, K, Q, T, S) in the dtype of the queries.
    """
    scores = [_scores(q_BKQTH, part.keys_BKSH.to(q_BKQTH.dtype)) for part in parts]
    scores_BKQTS = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    scores_BKQTS = scores_BKQTS * q_BKQTH.shape[-1] ** -0.5
    scores_BKQTS = scores_BKQTS.to(torch.promote_types(scores_BKQTS.dtype, torch.float32))
    if score_cap is not None:
        scores_BKQTS = SoftCap(score_cap)(scores_BKQTS)
    if bias_BKQTS is not None:
        scores_BKQTS = scores_BKQTS + bias_BKQTS.to(scores_BKQTS.dtype)
    # Not -inf: a row that sees nothing, such as padding, must stay finite.
    lowest = torch.finfo(scores_BKQTS.dtype).min
    scores_BKQTS = torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)
    if sinks_KQ is not None:
        return softmax_with_sinks(scores_BKQTS, sinks_KQ).to(q_BKQTH.dtype)
    return torch.softmax(scores_BKQTS, dim=-1).to(q_BKQTH.dtype)


def weighted_values(weights_BKQTS: torch.Tensor, parts: Sequence[LayerCache]) -> torch.Tensor:
    """Sum the values of all columns by their weights, (B, K, Q, T, H)."""
    dtype = weights_BKQTS.dtype
    sums = [
        _products(weights_BKQTS[..., columns], part.values_BKSH.to(dtype))
        for part, columns in zip(parts, _columns(parts), strict=True)
    ]
    return sum(sums[1:], sums[0])


def zero_unattended(parts: Sequence[LayerCache], mask_BTS: torch.Tensor) -> list[LayerCache]:
    """Zero the keys and values that no query attends to, because 0 * NaN is NaN."""
    seen_BS = torch.any(mask_BTS, dim=1)
    cleaned = []
    for part, columns in zip(parts, _columns(parts), strict=True):
        seen = seen_BS[:, None, columns, None]
        keys, values = (torch.where(seen, x, 0.0) for x in (part.keys_BKSH, part.values_BKSH))
        cleaned.append(LayerCache(keys, values))
    return cleaned


def _columns(parts: Sequence[LayerCache]) -> list[slice]:
    """Return which of the columns each part holds."""
    sizes = [part.keys_BKSH.shape[2] for part in parts]
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _scores(q_BKQTH: torch.Tensor, keys_BKSH: torch.Tensor) -> torch.Tensor:
    """Multiply queries by keys, (B, K, Q, T, S)."""
    # twin: XLA takes keys that it has to swap at half the speed; BLAS swaps them as it reads.
    Q, T = q_BKQTH.shape[2:4]
    return (q_BKQTH.flatten(2, 3) @ torch.swapaxes(keys_BKSH, 2, 3)).unflatten(2, (Q, T))


def _products(weights_BKQTS: torch.Tensor, values_BKSH: torch.Tensor) -> torch.Tensor:
    """Multiply weights by values, (B, K, Q, T, H)."""
    Q, T = weights_BKQTS.shape[2:4]
    return (weights_BKQTS.flatten(2, 3) @ values_BKSH).unflatten(2, (Q, T))
