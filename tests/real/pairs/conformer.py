"""A Conformer block: two half-step feed-forwards, attention with a mask, a gated convolution."""

import numpy as np
from flax import nnx
from torch import nn

D, N, K = 12, 2, 5


class FeedForward(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.SiLU(), nn.Dropout(0.1), nn.Linear(2 * D, D)
        )


class ConvModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm = nn.LayerNorm(D)
        self.pointwise_conv1 = nn.Conv1d(D, 2 * D, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(D, D, K, padding=K // 2, groups=D, bias=False)
        self.norm = nn.GroupNorm(1, D)
        self.pointwise_conv2 = nn.Conv1d(D, D, 1, bias=False)

    def forward(self, x):
        x = nn.functional.glu(self.pointwise_conv1(self.layer_norm(x).mT), dim=1)
        return self.pointwise_conv2(nn.functional.silu(self.norm(self.depthwise_conv(x)))).mT


class ConformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn1, self.ffn2, self.conv_module = FeedForward(), FeedForward(), ConvModule()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attn = nn.MultiheadAttention(D, N, dropout=0.1, batch_first=True)

    def forward(self, x, padding_mask=None):
        x = x + 0.5 * self.ffn1(x)
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, y, y, key_padding_mask=padding_mask, need_weights=False)[0]
        x = x + self.conv_module(x)
        return self.final_layer_norm(x + 0.5 * self.ffn2(x))


def norm(rngs):
    return nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)


class FFN(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = norm(rngs), nnx.Dropout(0.1, rngs=rngs)
        self.expand, self.contract = (
            nnx.Linear(D, 2 * D, rngs=rngs),
            nnx.Linear(2 * D, D, rngs=rngs),
        )

    def __call__(self, x):
        return self.contract(self.drop(nnx.swish(self.expand(self.norm(x)))))


class Convolution(nnx.Module):
    def __init__(self, rngs):
        bare = dict(use_bias=False, rngs=rngs)
        self.norm_in, self.norm_out = norm(rngs), nnx.GroupNorm(D, 1, epsilon=1e-5, rngs=rngs)
        self.gated, self.point = nnx.Linear(D, 2 * D, **bare), nnx.Linear(D, D, **bare)
        self.depth = nnx.Conv(D, D, (K,), feature_group_count=D, **bare)

    def __call__(self, x):
        return self.point(
            nnx.swish(self.norm_out(self.depth(nnx.glu(self.gated(self.norm_in(x))))))
        )


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.before, self.after, self.conv = FFN(rngs), FFN(rngs), Convolution(rngs)
        self.norm_attn, self.norm_out = norm(rngs), norm(rngs)
        self.mha = nnx.MultiHeadAttention(N, D, dropout_rate=0.1, decode=False, rngs=rngs)

    def __call__(self, x, padding=None):
        x = x + self.before(x) / 2
        x = x + self.mha(self.norm_attn(x), mask=~padding[:, None, None, :])
        x = x + self.conv(x)
        return self.norm_out(x + self.after(x) / 2)


net, port = ConformerBlock, Port


def make(rng):
    return rng.normal(size=(2, 7, D)), np.arange(7) >= rng.integers(4, 8, (2, 1))


FAULTS = [
    (
        "whole steps",
        "self.before(x) / 2",
        "self.before(x)",
        "ConformerBlock|before|ffn1",
        "scale of 1",
    ),
    (
        "relu for silu",
        "nnx.swish(self.norm_out(",
        "nnx.relu(self.norm_out(",
        "conv|conv_module",
        "relu",
    ),
    (
        "epsilon of Flax",
        "nnx.GroupNorm(D, 1, epsilon=1e-5, rngs=rngs)",
        "nnx.GroupNorm(D, 1, rngs=rngs)",
        "conv.norm_out|conv_module.norm",
        "1e-06",
    ),
]
