"""A residual net with batch norm, whose running variance the port keeps as torch does."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn


def conv3x3(i, o, stride=1):
    return nn.Conv2d(i, o, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv3x3(o, o), nn.BatchNorm2d(o)
        self.downsample = None
        if i != o:
            self.downsample = nn.Sequential(
                nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + identity)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 7, 2, padding=3, bias=False), nn.BatchNorm2d(6)
        self.layer1, self.layer2 = BasicBlock(6, 6, 1), BasicBlock(6, 8, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        return self.fc(self.layer2(self.layer1(x)).mean((-2, -1)))


class Norm(nnx.BatchNorm):  # torch keeps the unbiased variance
    def __init__(self, o, rngs):
        super().__init__(o, momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x):
        y = super().__call__(x)
        if not self.use_running_average:
            count = x.size / x.shape[-1]
            self.var[...] += (1 - self.momentum) * x.var((0, 1, 2)) / (count - 1)
        return y


class Block(nnx.Module):
    def __init__(self, i, o, stride, rngs):
        bare = dict(use_bias=False, rngs=rngs)
        self.conv1 = nnx.Conv(i, o, (3, 3), strides=stride, padding=1, **bare)
        self.conv2 = nnx.Conv(o, o, (3, 3), padding=1, **bare)
        self.norm1, self.norm2 = Norm(o, rngs), Norm(o, rngs)
        self.shortcut = nnx.Sequential()
        if i != o:
            conv = nnx.Conv(i, o, (1, 1), strides=stride, padding="VALID", **bare)
            self.shortcut = nnx.Sequential(conv, Norm(o, rngs))

    def __call__(self, x):
        y = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
        return jax.nn.relu(y + self.shortcut(x))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 6, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.norm = Norm(6, rngs)
        self.blocks = nnx.List([Block(6, 6, 1, rngs), Block(6, 8, 2, rngs)])
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(jnp.transpose(x, (0, 2, 3, 1)))))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


net, port = ResNet, Port


def make(rng):
    return rng.normal(size=(3, 3, 16, 16))


FAULTS = [
    (
        "padding SAME at stride 2",
        "strides=stride, padding=1",
        'strides=stride, padding="SAME"',
        "blocks.1.conv1|layer2.conv1",
        "SAME",
    ),
    ("epsilon 1e-3", "epsilon=1e-5", "epsilon=1e-3", "norm|bn1", "0.001"),
    (
        "second norm twice",
        "relu(y + self",
        "relu(self.norm2(y) + self",
        "blocks.0|layer1",
        "bn2 twice",
    ),
]
