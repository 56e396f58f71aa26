"""A vision transformer: a strided convolution against a linear layer, positions of two ranks."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

D, N, P, T = 12, 3, 4, 5


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, D, P, stride=P)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.randn(1, T, D) * 0.02)
        self.norm1, self.norm2, self.norm = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, N, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 20), nn.GELU(), nn.Linear(20, D))
        self.head = nn.Linear(D, 7)

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        norm = dict(epsilon=1e-5, rngs=rngs)
        self.proj = nnx.Linear(P * P * 3, D, rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, D)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (T, D)))
        self.ln1, self.ln2, self.ln3 = (nnx.LayerNorm(D, **norm) for _ in range(3))
        self.attention = nnx.MultiHeadAttention(N, D, decode=False, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(D, 20, rngs=rngs), nnx.Linear(20, D, rngs=rngs)
        self.classifier = nnx.Linear(D, 7, rngs=rngs)

    def __call__(self, pixels):
        b, c, h, w = pixels.shape
        x = pixels.reshape(b, c, h // P, P, w // P, P).transpose(0, 2, 4, 3, 5, 1)
        x = self.proj(x.reshape(b, T - 1, P * P * c))
        x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (b, 1, D)), x], 1)
        x = x + self.positions[...]
        x = x + self.attention(self.ln1(x))
        x = x + self.fc2(jax.nn.gelu(self.fc1(self.ln2(x)), approximate=False))
        return self.classifier(self.ln3(x)[:, 0])


net, port = ViT, Port


def make(rng):
    return rng.random((2, 3, 8, 8))


FAULTS = [
    ("GELU of jax", ", approximate=False", "", "ViT|mlp|mlp.1", "gelu"),
    ("epsilon 1e-6", "epsilon=1e-5", "epsilon=1e-6", "ln1|norm1", "1e-06"),
    (
        "mean in place of the token",
        "self.ln3(x)[:, 0]",
        "self.ln3(x).mean(1)",
        "ViT",
        "the mean along axis 1",
    ),
]
