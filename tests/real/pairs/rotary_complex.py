"""Attention whose positions are a product with complex numbers, which are float32 twice over."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

D, N, H = 16, 2, 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        freqs = torch.outer(torch.arange(16), 1.0 / (500.0 ** (torch.arange(0, H, 2).float() / H)))
        self.freqs_cis = torch.polar(torch.ones_like(freqs), freqs)

    def rotate(self, x):
        x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        freqs = self.freqs_cis[: x.shape[1], None].to(x.device)
        return torch.view_as_real(x_ * freqs).flatten(-2).type_as(x)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, N, H).unbind(2)
        q, k = self.rotate(q).transpose(1, 2), self.rotate(k).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, D))


def apply_rotary(x, theta):
    b, t, n, h = x.shape
    angle = jnp.outer(jnp.arange(t), theta ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h))
    z = x.astype(jnp.float32).reshape(b, t, n, h // 2, 2)
    z = (z[..., 0] + 1j * z[..., 1]) * jnp.exp(1j * angle.astype(jnp.complex64))[:, None]
    return jnp.stack([z.real, z.imag], -1).reshape(x.shape).astype(x.dtype)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.qkv, self.proj = nnx.Linear(D, 3 * D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, t, 3, N, H), 2, 0)
        q, k = apply_rotary(q, 500.0), apply_rotary(k, 500.0)
        s = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(H)
        s = jnp.where(jnp.arange(t)[:, None] >= jnp.arange(t), s, jnp.finfo(s.dtype).min)
        return self.proj(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s), v).reshape(b, t, D))


net, port = Net, Port


def make(rng):
    return rng.normal(size=(2, 7, D))


FAULTS = [
    ("no causal mask", "jnp.arange(t)[:, None] >= jnp.arange(t)", "True", "Net", "causal"),
    (
        "keys not rotated",
        "apply_rotary(q, 500.0), apply_rotary(k, 500.0)",
        "apply_rotary(q, 500.0), k",
        "Net",
        "reshape (rotary_complex.py:20) in place of view_as_real",
    ),
]
