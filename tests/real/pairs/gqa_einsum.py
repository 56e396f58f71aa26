"""Grouped-query attention with a head axis in its kernels, against four linear layers."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

D, N, K, H = 20, 4, 2, 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(D, N * H)
        self.key, self.value = nn.Linear(D, K * H), nn.Linear(D, K * H)
        self.out = nn.Linear(N * H, D, bias=False)

    def forward(self, x, mask=None):
        b, t, _ = x.shape
        q = self.query(x).reshape(b, t, N, H).permute(0, 2, 1, 3)
        k = self.key(x).reshape(b, t, K, H).permute(0, 2, 3, 1).repeat_interleave(N // K, 1)
        v = self.value(x).reshape(b, t, K, H).permute(0, 2, 1, 3).repeat_interleave(N // K, 1)
        scores = torch.matmul(q, k) / H**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        y = torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)
        return self.out(y.permute(0, 2, 1, 3).flatten(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention()

    def forward(self, x, mask=None):
        return x + self.attention(self.norm(x), mask)


class Heads(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        self.q_kernel = nnx.Param(init(rngs.params(), (D, N, H)))
        self.kv_kernel = nnx.Param(init(rngs.params(), (2, D, K, H)))
        self.q_bias, self.kv_bias = nnx.Param(jnp.zeros((N, H))), nnx.Param(jnp.zeros((2, K, H)))
        self.out_kernel = nnx.Param(init(rngs.params(), (N, H, D)))

    def __call__(self, x, mask):
        b, t, _ = x.shape
        q = jnp.einsum("btd,dnh->btnh", x, self.q_kernel[...]) + self.q_bias[...]
        k, v = jnp.einsum("btd,cdkh->cbtkh", x, self.kv_kernel[...]) + self.kv_bias[:, None, None]
        q = q.reshape(b, t, K, N // K, H)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * H**-0.5
        scores = jnp.where(mask[:, None, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(x.dtype)
        y = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, N, H)
        return jnp.einsum("btnh,nhd->btd", y, self.out_kernel[...])


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attn = Heads(rngs)
        self.ln = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, x, mask):
        return x + self.attn(self.ln(x), mask)


net, port = Net, Port


def make(rng):
    return rng.normal(size=(3, 5, D)), np.arange(5) < rng.integers(2, 6, (3, 1))


FAULTS = [
    (
        "groups tiled",
        "q = q.reshape(b, t, K, N // K, H)",
        "q = q.reshape(b, t, N // K, K, H).swapaxes(2, 3)",
        "Attention|attention|attn|Net",
        "repeats tiled|query.weight and 1 more in the order 1, 3, 2, 4",
    ),
    ("epsilon of Flax", "epsilon=1e-5, ", "", "ln|norm", "1e-06"),
    (
        "no mask",
        "jnp.where(mask[:, None, None, None, :], scores, jnp.finfo(scores.dtype).min)",
        "scores",
        "attn|attention",
        "no mask|mask",
    ),
]
