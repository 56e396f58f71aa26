"""The GPT with another head: a class for every token, or one for the sequence.

Read beside flax_gpt/training/classifier.py.

Dimension key: B batch, T tokens, D embed dim, C classes.
"""

import torch
from torch import nn

from torch_gpt.config import GPTConfig
from torch_gpt.layers import linear, split_or_none
from torch_gpt.model import GPT


class TokenClassifier(nn.Module):
    """A model that names a class for every token, from it and what stands before it.

    Args:
        config: of the GPT below the head.
        num_classes: C.
        key: draws the initial weights; None leaves zeros.
    """

    def __init__(self, config: GPTConfig, num_classes: int, key: torch.Tensor | None = None):
        super().__init__()
        subkeys = split_or_none(key, 2)
        self.gpt = GPT(config, subkeys[0])
        self.head = linear(config, config.embed_dim, num_classes, config.init_std, subkeys[1])

    def forward(
        self,
        tokens_BT: torch.Tensor,
        counts_B: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score the classes, (B, T, C); scores of padding mean nothing."""
        x_BTD, _ = self.gpt.hidden(tokens_BT, None, counts_B, key)
        return self.head(x_BTD)


class SequenceClassifier(TokenClassifier):
    """A model that names one class per sequence, by the mean over its real tokens."""

    def forward(
        self,
        tokens_BT: torch.Tensor,
        counts_B: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score the classes, (B, C)."""
        x_BTD, _ = self.gpt.hidden(tokens_BT, None, counts_B, key)
        return self.head(mean_over_tokens(x_BTD, counts_B))


def mean_over_tokens(x_BTD: torch.Tensor, counts_B: torch.Tensor | None = None) -> torch.Tensor:
    """Average over each row's real tokens, (B, D); zeros for a row that has none."""
    wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    if counts_B is None:
        return torch.mean(wide_BTD, dim=1).to(x_BTD.dtype)
    real_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None, :] < counts_B[:, None]
    total_BD = torch.sum(torch.where(real_BT[:, :, None], wide_BTD, 0.0), dim=1)
    counts_B1 = torch.clamp(counts_B, min=1)[:, None].to(wide_BTD.dtype)
    return (total_BD / counts_B1).to(x_BTD.dtype)
