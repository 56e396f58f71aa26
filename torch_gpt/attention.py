"""Attention by hand: over the new tokens, and over what the cache holds beside them.

Read beside flax_gpt/attention.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, H head dim. A column is a slot of the
cache or a new token.

Written by hand, because the frameworks' fused attentions compute their softmax in float32, which
spoils float64. Here it is float32 for the 16-bit types and the compute dtype for others.
"""

from collections.abc import Sequence

import torch

from torch_gpt.cache import LayerCache
from torch_gpt.positions import Placement, choose


def weigh(
    q_BKTH: torch.Tensor, parts: Sequence[LayerCache], mask_BTS: torch.Tensor
) -> torch.Tensor:
    """The attention weights, softmax(q k / sqrt(H)), of columns that lie in more than one place.

    Args:
        q_BKTH: queries.
        parts: keys and values, which side by side are the S columns.
        mask_BTS: True where a query sees a column.

    Returns:
        Weights (B, K, T, S) in the dtype of the queries.
    """
    scores = [_score(q_BKTH, part.keys_BKSH.to(q_BKTH.dtype)) for part in parts]
    scores_BKTS = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    scores_BKTS = scores_BKTS * q_BKTH.shape[-1] ** -0.5
    # Not -inf: a row that sees nothing, such as padding, must stay finite.
    scores_BKTS = scores_BKTS.to(torch.promote_types(scores_BKTS.dtype, torch.float32))
    lowest = torch.finfo(scores_BKTS.dtype).min
    scores_BKTS = torch.where(mask_BTS[:, None, :, :], scores_BKTS, lowest)
    return torch.softmax(scores_BKTS, dim=-1).to(q_BKTH.dtype)


def mix(weights_BKTS: torch.Tensor, parts: Sequence[LayerCache]) -> torch.Tensor:
    """The values of all columns by their weights, (B, K, T, H)."""
    mixed, start = [], 0
    for part in parts:
        end = start + part.values_BKSH.shape[2]
        mixed.append(weights_BKTS[..., start:end] @ part.values_BKSH.to(weights_BKTS.dtype))
        start = end
    return sum(mixed[1:], mixed[0])


def attend(
    q_BKTH: torch.Tensor, new: LayerCache, layer: LayerCache, placement: Placement
) -> tuple[torch.Tensor, LayerCache]:
    """Attention over what the cache holds, no further than needed, and over the new tokens.

    Args:
        q_BKTH: queries.
        new: keys and values of the new tokens.
        layer: those of the tokens before them.
        placement: of the call.

    Returns:
        The mixed values (B, K, T, H), and the layer with the new tokens in it.
    """
    # twin: XLA copies a cache that is read after it was written, so jax attends to the slots and
    # to the tokens apart and writes last; torch writes first and reads one piece.
    layer = layer.append(new.keys_BKSH, new.values_BKSH, placement)
    num_slots = placement.rungs[-1]
    held = LayerCache(layer.keys_BKSH[:, :, :num_slots], layer.values_BKSH[:, :, :num_slots])

    def over(held):
        return mix(weigh(q_BKTH, [held], placement.mask_BTS), [held])

    def careful():
        return over(cleaned(held, placement.mask_BTS))

    # It need not show in a gradient, which takes the careful way.
    if torch.is_grad_enabled():
        return careful(), layer
    mixed_BKTH = over(held)
    if placement.filled:
        return mixed_BKTH, layer
    # 0 times NaN is NaN, so garbage that is not finite shows.
    shows = ~torch.all(torch.isfinite(mixed_BKTH))
    return choose(shows, [lambda: mixed_BKTH, careful]), layer


def cleaned(layer: LayerCache, mask_BTS: torch.Tensor) -> LayerCache:
    """The layer with zeros where no query looks, for 0 times NaN is NaN."""
    seen = mask_BTS[:, -1, None, :, None]
    return LayerCache(
        torch.where(seen, layer.keys_BKSH, 0.0), torch.where(seen, layer.values_BKSH, 0.0)
    )


def _score(q_BKTH: torch.Tensor, keys_BKSH: torch.Tensor) -> torch.Tensor:
    """Products of queries and keys, (B, K, T, S)."""
    # twin: XLA takes keys that it has to swap at half the speed; BLAS swaps them as it reads.
    return q_BKTH @ torch.swapaxes(keys_BKSH, 2, 3)
