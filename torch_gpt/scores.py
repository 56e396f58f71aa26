"""What scores go through besides a mask: a bound, or sinks. Read beside flax_gpt/scores.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, N query
heads.
"""

import dataclasses

import torch
from torch import nn

from torch_gpt.config import GPTConfig
from torch_gpt.layers import parameter_dtype
from torch_gpt.metadata import AttentionMetadata


@dataclasses.dataclass(frozen=True)
class CappedScores:
    """Scores that are bent so that none reaches a cap. Gemma team, "Gemma 2", 2024.

    Attributes:
        cap: see `layers.SoftCap`.
    """

    cap: float

    def __call__(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Add the cap to what a block knows of a call."""
        return dataclasses.replace(metadata, score_cap=self.cap)


class Sinks(nn.Module):
    """A learned score for each query head, to which a token can look instead of to tokens.

    Xiao et al., "Efficient streaming language models with attention sinks", 2024.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.num_kv_heads = config.kv_heads
        self.weight = nn.Parameter(torch.zeros(config.num_heads, dtype=parameter_dtype(config)))

    def forward(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Add the sinks to what a block knows of a call."""
        sinks_KQ = self.weight.reshape(self.num_kv_heads, -1)
        return dataclasses.replace(metadata, sinks_KQ=sinks_KQ)


def softmax_with_sinks(scores_BKQTS: torch.Tensor, sinks_KQ: torch.Tensor) -> torch.Tensor:
    """Compute the softmax over the columns and one sink, without the sink's weight."""
    sinks_1KQ11 = sinks_KQ[None, :, :, None, None].to(scores_BKQTS.dtype)
    sinks_BKQT1 = sinks_1KQ11.expand(*scores_BKQTS.shape[:-1], 1)
    return torch.softmax(torch.cat([scores_BKQTS, sinks_BKQT1], dim=-1), dim=-1)[..., :-1]
