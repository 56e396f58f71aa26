"""A ConvNeXt: depthwise convolutions, channels last inside of a block, layer scales."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.stages = nn.Sequential(Block(6), Block(6))
        self.downsample = nn.Sequential(nn.GroupNorm(1, 6), nn.Conv2d(6, 10, 2, stride=2))
        self.head = nn.Sequential(nn.LayerNorm(10, eps=1e-6), nn.Linear(10, 4))

    def forward(self, x):
        return self.head(self.downsample(self.stages(self.stem(x))).mean((2, 3)))


class ConvBlock(nnx.Module):
    def __init__(self, dim, rngs):
        conv = dict(padding="SAME", feature_group_count=dim, rngs=rngs)
        self.depthwise = nnx.Conv(dim, dim, (7, 7), **conv)
        self.ln = nnx.LayerNorm(dim, epsilon=1e-6, rngs=rngs)
        self.up, self.down = (
            nnx.Conv(dim, 4 * dim, (1, 1), rngs=rngs),
            nnx.Linear(4 * dim, dim, rngs=rngs),
        )
        self.layer_scale = nnx.Param(jnp.full((1, 1, 1, dim), 1e-6))

    def __call__(self, x):
        y = jax.nn.gelu(self.up(self.ln(self.depthwise(x))), approximate=False)
        return x + self.layer_scale[...] * self.down(y)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        patch = dict(padding="VALID", rngs=rngs)
        self.stem = nnx.Conv(3, 6, (2, 2), strides=2, **patch)
        self.blocks = nnx.List([ConvBlock(6, rngs) for _ in range(2)])
        self.group = nnx.GroupNorm(6, num_groups=1, epsilon=1e-5, rngs=rngs)
        self.reduce = nnx.Conv(6, 10, (2, 2), strides=2, **patch)
        self.final_norm = nnx.LayerNorm(10, epsilon=1e-6, rngs=rngs)
        self.fc = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(jnp.moveaxis(x, 1, -1))
        for block in self.blocks:
            x = block(x)
        return self.fc(self.final_norm(self.reduce(self.group(x)).mean((1, 2))))


net, port = Net, Port


def make(rng):
    return rng.normal(size=(2, 3, 16, 16))


FAULTS = [
    (
        "epsilon of Flax",
        "num_groups=1, epsilon=1e-5",
        "num_groups=1",
        "group|downsample.0",
        "1e-06",
    ),
    ("GELU of jax", ", approximate=False", "", "blocks.0|stages.0", "gelu"),
    (
        "scale left out",
        "x + self.layer_scale[...] * self.down(y)",
        "x + self.down(y) + 0 * self.layer_scale[...]",
        "blocks.0|stages.0",
        "y in place of x * y",
    ),
]
