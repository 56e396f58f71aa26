"""The same attention, reading only the slots in use. Read beside flax_gpt/fast_attention.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, H head
dim.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from torch_gpt import attention
from torch_gpt.attention import Drop, attention_weights, weighted_values, zero_unattended
from torch_gpt.cache import LayerCache
from torch_gpt.layers import identity
from torch_gpt.metadata import AttentionMetadata

_Result = TypeVar("_Result")


def attend(
    q_BKQTH: torch.Tensor,
    new: LayerCache,
    past: LayerCache | None,
    metadata: AttentionMetadata,
    drop: Drop = identity,
) -> tuple[torch.Tensor, LayerCache | None]:
    """Compute `attention.attend` at a cost that follows a cache's length, not its capacity.

    The results are equal up to rounding. With any `drop` but `identity`, which must see the weights
    of all slots, it is `attention.attend` itself.

    Returns:
        See `attention.attend`.
    """
    if past is None or drop is not identity:
        return attention.attend(q_BKQTH, new, past, metadata, drop)
    layer = past.append(new, metadata)
    sizes, _ = slots_to_read(layer.keys_BKSH.shape[2], metadata.longest)
    scores = metadata.bias_BKQTS, metadata.sinks_KQ, metadata.score_cap
    operands = q_BKQTH, layer, metadata.mask_BTS, *scores
    # In a gradient it need not show, so that is always taken with zeros in place of garbage.
    if torch.is_grad_enabled():
        return _over_slots(sizes[-1], True, *operands), layer
    values_BKQTH = _over_slots(sizes[-1], False, *operands)
    if metadata.all_valid:
        return values_BKQTH, layer
    # Garbage that is not finite shows, because 0 * NaN is NaN.
    shows = ~torch.all(torch.isfinite(values_BKQTH))
    branches = [lambda: values_BKQTH, lambda: _over_slots(sizes[-1], True, *operands)]
    return switch(shows, branches), layer


def slots_to_read(
    num_slots: int, longest: int | None
) -> tuple[tuple[int, ...], int | torch.Tensor]:
    """Choose how many slots of each row to read.

    Args:
        num_slots: of the cache.
        longest: tokens in the longest row.

    Returns:
        Sizes in rising order, the last of which reaches every token, and the index of the smallest
        one that reaches `longest`.
    """
    # twin: a compiled program has static shapes, so jax reads the smallest of a few sizes, each
    # twice the one before; torch, where it can read the lengths, reads exactly so far.
    return (num_slots if longest is None else max(1, longest),), 0


def switch(
    index: int | bool | torch.Tensor, branches: Sequence[Callable[..., _Result]], *operands: object
) -> _Result:
    """Call `branches[index]` on the operands.

    The last branch must be correct for every index. It is taken where an accelerator would have to
    tell the host which one to start.

    Returns:
        What the branch returns.
    """
    # twin: under jax.jit a CPU branches as it runs; torch traces for accelerators only.
    if torch.compiler.is_compiling():
        return branches[-1](*operands)
    return branches[int(index)](*operands)


def _over_slots(
    num_slots: int,
    clean: bool,
    q_BKQTH: torch.Tensor,
    layer: LayerCache,
    mask_BTS: torch.Tensor,
    bias_BKQTS: torch.Tensor | None,
    sinks_KQ: torch.Tensor | None,
    score_cap: float | None,
) -> torch.Tensor:
    """Attend to the first slots of the cache and to the new tokens."""
    mask_BTS = mask_BTS[..., :num_slots]
    bias_BKQTS = None if bias_BKQTS is None else bias_BKQTS[..., :num_slots]
    parts = [LayerCache(layer.keys_BKSH[:, :, :num_slots], layer.values_BKSH[:, :, :num_slots])]
    if clean:
        parts = zero_unattended(parts, mask_BTS)
    scores = bias_BKQTS, sinks_KQ, score_cap
    return weighted_values(attention_weights(q_BKQTH, parts, mask_BTS, *scores), parts)
