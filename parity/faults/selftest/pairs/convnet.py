"""A convolutional net with batch norm: channels second in torch and last in Flax."""

import jax
import numpy as np
import torch
from flax import nnx


class BatchNorm(nnx.BatchNorm):
    """With torch's running variance, which is the unbiased one; Flax keeps the biased one."""

    def __call__(self, x):
        y = super().__call__(x)
        if not self.use_running_average:
            count = x.size // x.shape[-1]
            self.var[...] += (1 - self.momentum) * x.var(range(x.ndim - 1)) / (count - 1)
        return y


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        norm = dict(momentum=0.9, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.conv1 = nnx.Conv(3, 8, (3, 3), padding=1, rngs=rngs)
        self.norm1 = BatchNorm(8, **norm)
        self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs)
        self.norm2 = BatchNorm(8, **norm)
        self.head = nnx.Linear(8 * 4 * 4, 5, rngs=rngs)

    def __call__(self, x):
        x = x.transpose(0, 2, 3, 1)
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        x = jax.nn.relu(self.norm2(self.conv2(x)))
        return self.head(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = torch.nn.BatchNorm2d(8)
        self.conv2 = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8 * 4 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.flatten(1))


def torch_net() -> torch.nn.Module:
    return TorchNet()


def flax_net() -> nnx.Module:
    return FlaxNet(nnx.Rngs(0))


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(3, 3, 8, 8))
