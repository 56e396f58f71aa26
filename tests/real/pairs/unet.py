"""A diffusion U-Net: time embeddings in float32, group norms, attention, skips and resizing."""

import math

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

C, E = 8, 12


def timestep_embedding(t, dim):
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class ResBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, i), nn.SiLU(), nn.Conv2d(i, o, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(E, 2 * o))
        self.out_norm, self.out_conv = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_norm(h.float()).type(h.dtype) * (1 + scale) + shift
        return self.skip(x) + self.out_conv(nn.functional.silu(h))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(C, E), nn.SiLU(), nn.Linear(E, E))
        self.inp = nn.Conv2d(3, C, 3, padding=1)
        self.down, self.op = ResBlock(C, C), nn.Conv2d(C, C, 3, stride=2, padding=1)
        self.mid, self.up = ResBlock(C, C), ResBlock(2 * C, C)
        self.out = nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, x, timesteps):
        emb = self.time_embed(timestep_embedding(timesteps, C).to(x.dtype))
        first = self.down(self.inp(x), emb)
        h = self.mid(self.op(first), emb)
        h = nn.functional.interpolate(h, scale_factor=2, mode="nearest")
        return self.out(self.up(torch.cat([h, first], dim=1), emb))


class Res(nnx.Module):
    def __init__(self, i, o, rngs):
        same = dict(padding="SAME", rngs=rngs)
        self.norm1 = nnx.GroupNorm(i, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.conv1 = nnx.Conv(i, o, (3, 3), **same)
        self.temb_proj = nnx.Linear(E, 2 * o, rngs=rngs)
        self.norm2 = nnx.GroupNorm(o, num_groups=4, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.conv2 = nnx.Conv(o, o, (3, 3), **same)
        self.shortcut = nnx.Linear(i, o, rngs=rngs) if i != o else None

    def __call__(self, x, temb):
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        scale, shift = jnp.split(self.temb_proj(jax.nn.silu(temb))[:, None, None], 2, -1)
        h = self.norm2(h).astype(x.dtype) * (1 + scale) + shift
        return (x if self.shortcut is None else self.shortcut(x)) + self.conv2(jax.nn.silu(h))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        conv = lambda i, o, **k: nnx.Conv(i, o, (3, 3), rngs=rngs, **{"padding": "SAME"} | k)  # noqa: E731
        self.temb0, self.temb1 = nnx.Linear(C, E, rngs=rngs), nnx.Linear(E, E, rngs=rngs)
        self.conv_in, self.conv_out = conv(3, C), conv(C, 3)
        self.downsample = conv(C, C, strides=2, padding=[(1, 1), (1, 1)])
        self.res_down, self.res_mid, self.res_up = (
            Res(C, C, rngs),
            Res(C, C, rngs),
            Res(2 * C, C, rngs),
        )

    def __call__(self, x, t):
        x = x.transpose(0, 2, 3, 1)
        angle = t[:, None].astype(jnp.float32) * 1e4 ** (-jnp.arange(C // 2) / (C // 2))
        temb = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(x.dtype)
        temb = self.temb1(jax.nn.silu(self.temb0(temb)))
        skip = self.res_down(self.conv_in(x), temb)
        h = self.res_mid(self.downsample(skip), temb)
        h = jax.image.resize(h, (*skip.shape[:3], C), method="nearest")
        return self.conv_out(self.res_up(jnp.concatenate([h, skip], -1), temb)).transpose(
            0, 3, 1, 2
        )


net, port = UNet, Port


def make(rng):
    return rng.normal(size=(2, 3, 8, 8)), rng.integers(0, 50, 2)


FAULTS = [
    (
        "sines first",
        "[jnp.cos(angle), jnp.sin(angle)]",
        "[jnp.sin(angle), jnp.cos(angle)]",
        "UNet|time_embed|temb0",
        "reverse order (cat",
    ),
    (
        "epsilon of Flax",
        "num_groups=4, epsilon=1e-5, rngs=rngs",
        "num_groups=4, rngs=rngs",
        "res_down.norm1|down.in_layers.0",
        "1e-06",
    ),
    ("padding SAME at stride 2", ", padding=[(1, 1), (1, 1)])", ")", "downsample|op", "SAME"),
]
