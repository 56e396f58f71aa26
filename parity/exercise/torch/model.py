"""A small GPT: learned positions, pre-norm blocks, output weights tied to the token table.

Dimension key: B batch, T tokens read, S tokens seen, D embed dim, N heads, H head dim, F mlp dim,
V vocabulary.
"""

import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants.

    Attributes:
        vocab_size: V, how many different tokens there are.
        context_length: the most tokens that the model reads at once.
        embed_dim: D, numbers per token in the residual stream.
        num_layers: blocks.
        num_heads: N; each has embed_dim / num_heads numbers.
        mlp_dim: F, hidden numbers per token in an MLP.
        init_std: standard deviation of all initial matrices and tables.
        norm_epsilon: added to the variance in a norm.
    """

    vocab_size: int
    context_length: int
    embed_dim: int = 32
    num_layers: int = 2
    num_heads: int = 4
    mlp_dim: int = 96
    init_std: float = 0.02
    norm_epsilon: float = 1e-5


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: Config, rng: np.random.Generator):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = linear(config.embed_dim, config.embed_dim, config.init_std, rng)
        self.key = linear(config.embed_dim, config.embed_dim, config.init_std, rng)
        self.value = linear(config.embed_dim, config.embed_dim, config.init_std, rng)
        self.out = linear(config.embed_dim, config.embed_dim, config.init_std, rng)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Mix along time: each token reads from itself and from those before it."""
        q_BNTH = self.split_heads(self.query(x_BTD))
        k_BNSH = self.split_heads(self.key(x_BTD))
        v_BNSH = self.split_heads(self.value(x_BTD))
        scores_BNTS = q_BNTH @ k_BNSH.transpose(2, 3) / q_BNTH.shape[-1] ** 0.5
        T, S = scores_BNTS.shape[2:]
        times_T1, slots_S = torch.arange(T)[:, None], torch.arange(S)
        visible_TS = slots_S <= times_T1
        lowest = torch.finfo(scores_BNTS.dtype).min
        scores_BNTS = scores_BNTS.masked_fill(~visible_TS, lowest)
        weights_BNTS = scores_BNTS.softmax(dim=-1)
        mixed_BNTH = weights_BNTS @ v_BNSH
        return self.out(self.join_heads(mixed_BNTH))

    def split_heads(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Give each head its own share of the channels, in order."""
        B, T, D = x_BTD.shape
        return x_BTD.reshape(B, T, self.num_heads, D // self.num_heads).transpose(1, 2)

    def join_heads(self, x_BNTH: torch.Tensor) -> torch.Tensor:
        """Undo `split_heads`."""
        B, N, T, H = x_BNTH.shape
        return x_BNTH.transpose(1, 2).reshape(B, T, N * H)


class MLP(nn.Module):
    """Two linear maps around a GELU, in its tanh form."""

    def __init__(self, config: Config, rng: np.random.Generator):
        super().__init__()
        self.up = linear(config.embed_dim, config.mlp_dim, config.init_std, rng)
        self.down = linear(config.mlp_dim, config.embed_dim, config.init_std, rng)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Transform each token alone."""
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP: each reads the stream through a norm, and is added to the stream."""

    def __init__(self, config: Config, rng: np.random.Generator):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.embed_dim, eps=config.norm_epsilon)
        self.attention = Attention(config, rng)
        self.norm_2 = nn.LayerNorm(config.embed_dim, eps=config.norm_epsilon)
        self.mlp = MLP(config, rng)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the stream."""
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))
        x_BTD = x_BTD + self.mlp(self.norm_2(x_BTD))
        return x_BTD


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        config: sizes and constants.
        seed: of the initial weights; norms start as the identity, biases at zero.
    """

    def __init__(self, config: Config, seed: int = 0):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.config = config
        self.token_embedding = table(config.vocab_size, config.embed_dim, config.init_std, rng)
        self.position_embedding = table(
            config.context_length, config.embed_dim, config.init_std, rng
        )
        self.blocks = nn.ModuleList([Block(config, rng) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_epsilon)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Score the next token at every position.

        Args:
            tokens_BT: ids in [0, V), at most context_length of them in a row.

        Returns:
            Logits (B, T, V).
        """
        positions_T = torch.arange(tokens_BT.shape[1])
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        return x_BTD @ self.token_embedding.weight.T


def linear(in_dim: int, out_dim: int, std: float, rng: np.random.Generator) -> nn.Linear:
    """Make a linear map with normal weights, and a bias of zero."""
    layer = nn.Linear(in_dim, out_dim)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rng.normal(0.0, std, (in_dim, out_dim))).T)
        layer.bias.zero_()
    return layer


def table(num_rows: int, dim: int, std: float, rng: np.random.Generator) -> nn.Embedding:
    """Make a table with a learned vector per row, normal at first."""
    layer = nn.Embedding(num_rows, dim)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rng.normal(0.0, std, (num_rows, dim))))
    return layer
