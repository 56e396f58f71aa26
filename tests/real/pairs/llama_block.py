"""A Llama-like language model: RMS norms in float32, rotary tables as buffers, a gated MLP."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

V, D, N, H = 19, 12, 3, 4


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(
            x
        ) * self.weight


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(D, 20, bias=False) for _ in range(2))
        self.w2 = nn.Linear(20, D, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(D), RMSNorm(D)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        y = self.attention_norm(x)
        q, k, v = (f(y).view(b, t, N, H).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        q, k = (
            u * cos + torch.cat([-u[..., H // 2 :], u[..., : H // 2]], -1) * sin for u in (q, k)
        )
        scores = q @ k.transpose(2, 3) / H**0.5
        scores = scores + torch.full((t, t), float("-inf")).triu(1)
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(q)
        x = x + self.wo((weights @ v).transpose(1, 2).reshape(b, t, D))
        y = self.ffn_norm(x)
        return x + self.w2(nn.functional.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings, self.output = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.norm = RMSNorm(D)
        angles = torch.outer(torch.arange(16).float(), 10000.0 ** (-torch.arange(0, H, 2) / H))
        self.register_buffer("angles", torch.cat([angles, angles], -1), persistent=False)

    def forward(self, tokens):
        angles = self.angles[: tokens.shape[1]]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.output(self.norm(x)).float()


class Norm(nnx.Module):
    def __init__(self, dim, eps=1e-6):
        self.scale, self.eps = nnx.Param(jnp.ones(dim)), eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


def rotate(x):
    t, h = x.shape[1], x.shape[-1]
    frequencies = 1 / 10000.0 ** (jnp.arange(0, h, 2, dtype=jnp.float32) / h)
    angles = jnp.arange(t, dtype=jnp.float32)[:, None, None] * frequencies
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nnx.Module):
    def __init__(self, rngs):
        made = dict(use_bias=False, rngs=rngs)
        self.q, self.k, self.v, self.o = (nnx.Linear(D, D, **made) for _ in range(4))
        self.gate, self.up = nnx.Linear(D, 20, **made), nnx.Linear(D, 20, **made)
        self.down = nnx.Linear(20, D, **made)
        self.norm1, self.norm2 = Norm(D), Norm(D)

    def __call__(self, x):
        b, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).reshape(b, t, N, H) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("btnh,bsnh->bnts", rotate(q), rotate(k)) * H**-0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e30).astype(jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        x = x + self.o(jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(b, t, D))
        y = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Embed(V, D, rngs=rngs), Norm(D)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x)).astype(jnp.float32)


net, port = Llama, Port


def make(rng):
    return rng.integers(0, V, (2, 6))


FAULTS = [
    (
        "epsilon 1e-5",
        "def __init__(self, dim, eps=1e-6):\n        self.scale",
        "def __init__(self, dim, eps=1e-5):\n        self.scale",
        "blocks.0.norm1|layers.0.attention_norm",
        "1e-05",
    ),
    ("relu gate", "jax.nn.silu", "jax.nn.relu", "blocks.0|layers.0", "relu"),
    ("scale by D", "* H**-0.5", "* D**-0.5", "blocks.0|layers.0", "a scale of 12**-0.5"),
]
