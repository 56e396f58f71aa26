"""Positions as a bias on the scores, which depends on how far back a token looks.

Read beside flax_gpt/relative.py.

Dimension key: B batch, T new tokens, S columns, N query heads, K kv heads, Q query heads of one kv
head. A column is a slot of the cache or a new token.

Distances are those of slots, query minus column, never of places in a call; so prefill, chunks,
ragged rows and single steps all get the same bias.
"""

import numpy as np
import torch

from torch_gpt.config import GPTConfig
from torch_gpt.positions import Placement


def distances(placement: Placement) -> torch.Tensor:
    """How many tokens back each query (B, T, S) finds a column; 0 for what it cannot see."""
    back_BTS = placement.positions_BT[:, :, None] - placement.columns_BS[:, None, :]
    return torch.clamp(back_BTS, min=0)


def alibi(config: GPTConfig, placement: Placement) -> torch.Tensor:
    """Scores fall with the distance, in each head at its own rate: (B, K, Q, T, S), in float32 at
    least. Press et al., "Train short, test long", 2022."""
    wide = torch.promote_types(getattr(torch, config.dtype), torch.float32)
    shape = 1, config.kv_heads, config.num_heads // config.kv_heads, 1, 1
    back_B11TS = distances(placement)[:, None, None].to(wide)
    slopes_1KQ11 = torch.from_numpy(slopes(config.num_heads)).to(back_B11TS).reshape(shape)
    return -slopes_1KQ11 * back_B11TS


def t5(config: GPTConfig, placement: Placement, table: torch.Tensor) -> torch.Tensor:
    """A learned score for each range of distances in each head: (B, K, Q, T, S).

    Args:
        table: scores (ranges, N). Unlike in T5 itself, products are scaled by the head's width.
    """
    bucket_of = torch.from_numpy(buckets(config)).to(table.device)
    farthest = config.t5_max_distance
    bucket_BTS = bucket_of[torch.clamp(distances(placement), max=farthest)]
    bias_BNTS = torch.movedim(table[bucket_BTS], -1, 1)
    B, _, T, S = bias_BNTS.shape
    return bias_BNTS.reshape(B, config.kv_heads, -1, T, S)


def slopes(num_heads: int) -> np.ndarray:
    """The rate of each head (N,), in float64.

    2 ** (-8 n / N) for a power of two; for other numbers those of the power below, and then every
    second one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    lower = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    upper = 2.0 ** (-4.0 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([lower, upper])[:num_heads]


def buckets(config: GPTConfig) -> np.ndarray:
    """The range that each distance from 0 to t5_max_distance falls into.

    Half of them for one distance each, the others in equal steps of its logarithm.
    """
    num_exact = config.t5_buckets // 2
    far = np.maximum(np.arange(config.t5_max_distance + 1), 1)
    steps = np.log(far / num_exact) / np.log(config.t5_max_distance / num_exact)
    logarithmic = num_exact + (steps * (config.t5_buckets - num_exact)).astype(np.int64)
    logarithmic = np.minimum(logarithmic, config.t5_buckets - 1)
    near = np.arange(config.t5_max_distance + 1)
    return np.where(near < num_exact, near, logarithmic)
