"""Attention by hand: over the new tokens, and over what the cache holds beside them.

Read beside flax_gpt/attention.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, H head
dim. A column is a slot of the cache or a new token. Query heads are grouped by the kv head that
they read, so keys and values are never repeated.

Written by hand, because the frameworks' fused attentions compute their softmax in float32, which
spoils float64. Here it is float32 for the 16-bit types and the compute dtype for others.
"""

from collections.abc import Sequence

import torch

from torch_gpt.cache import LayerCache
from torch_gpt.positions import Placement, choose


def weigh(
    q_BKQTH: torch.Tensor,
    parts: Sequence[LayerCache],
    mask_BTS: torch.Tensor,
    bias_BKQTS: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention weights, softmax(q k / sqrt(H) + bias), of columns in more than one place.

    Args:
        q_BKQTH: queries.
        parts: keys and values, which side by side are the S columns.
        mask_BTS: True where a query sees a column.
        bias_BKQTS: added to the scores; None for nothing.

    Returns:
        Weights (B, K, Q, T, S) in the dtype of the queries.
    """
    scores = [_score(q_BKQTH, part.keys_BKSH.to(q_BKQTH.dtype)) for part in parts]
    scores_BKQTS = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    scores_BKQTS = scores_BKQTS * q_BKQTH.shape[-1] ** -0.5
    # Not -inf: a row that sees nothing, such as padding, must stay finite.
    scores_BKQTS = scores_BKQTS.to(torch.promote_types(scores_BKQTS.dtype, torch.float32))
    if bias_BKQTS is not None:
        scores_BKQTS = scores_BKQTS + bias_BKQTS.to(scores_BKQTS.dtype)
    lowest = torch.finfo(scores_BKQTS.dtype).min
    scores_BKQTS = torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)
    return torch.softmax(scores_BKQTS, dim=-1).to(q_BKQTH.dtype)


def mix(weights_BKQTS: torch.Tensor, parts: Sequence[LayerCache]) -> torch.Tensor:
    """The values of all columns by their weights, (B, K, Q, T, H)."""
    mixed, start = [], 0
    for part in parts:
        end = start + part.values_BKSH.shape[2]
        values = part.values_BKSH.to(weights_BKQTS.dtype)
        mixed.append(_mixed(weights_BKQTS[..., start:end], values))
        start = end
    return sum(mixed[1:], mixed[0])


def attend(
    q_BKQTH: torch.Tensor, new: LayerCache, layer: LayerCache, placement: Placement
) -> tuple[torch.Tensor, LayerCache]:
    """Attention over what the cache holds, no further than needed, and over the new tokens.

    Args:
        q_BKQTH: queries.
        new: keys and values of the new tokens.
        layer: those of the tokens before them.
        placement: of the call.

    Returns:
        The mixed values (B, K, Q, T, H), and the layer with the new tokens in it.
    """
    # twin: XLA copies a cache that is read after it was written, so jax attends to the slots and
    # to the tokens apart and writes last; torch writes first and reads one piece.
    layer = layer.append(new.keys_BKSH, new.values_BKSH, placement)
    num_slots = placement.rungs[-1]
    held = LayerCache(layer.keys_BKSH[:, :, :num_slots], layer.values_BKSH[:, :, :num_slots])

    def over(held):
        weights_BKQTS = weigh(q_BKQTH, [held], placement.mask_BTS, placement.bias_BKQTS)
        return mix(weights_BKQTS, [held])

    def careful():
        return over(cleaned(held, placement.mask_BTS))

    # It need not show in a gradient, which takes the careful way.
    if torch.is_grad_enabled():
        return careful(), layer
    mixed_BKQTH = over(held)
    if placement.filled:
        return mixed_BKQTH, layer
    # 0 times NaN is NaN, so garbage that is not finite shows.
    shows = ~torch.all(torch.isfinite(mixed_BKQTH))
    return choose(shows, [lambda: mixed_BKQTH, careful]), layer


def cleaned(layer: LayerCache, mask_BTS: torch.Tensor) -> LayerCache:
    """The layer with zeros where no query looks, for 0 times NaN is NaN."""
    seen = torch.any(mask_BTS, dim=1)[:, None, :, None]
    return LayerCache(
        torch.where(seen, layer.keys_BKSH, 0.0), torch.where(seen, layer.values_BKSH, 0.0)
    )


def _score(q_BKQTH: torch.Tensor, keys_BKSH: torch.Tensor) -> torch.Tensor:
    """Products of queries and keys, (B, K, Q, T, S)."""
    # twin: XLA takes keys that it has to swap at half the speed; BLAS swaps them as it reads.
    Q, T = q_BKQTH.shape[2:4]
    return (q_BKQTH.flatten(2, 3) @ torch.swapaxes(keys_BKSH, 2, 3)).unflatten(2, (Q, T))


def _mixed(weights_BKQTS: torch.Tensor, values_BKSH: torch.Tensor) -> torch.Tensor:
    """Products of weights and values, (B, K, Q, T, H)."""
    Q, T = weights_BKQTS.shape[2:4]
    return (weights_BKQTS.flatten(2, 3) @ values_BKSH).unflatten(2, (Q, T))
