"""A sine network over coordinates, with Fourier features that are a buffer in torch alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


class Sine(nn.Module):
    def __init__(self, i, o, w0=30.0):
        super().__init__()
        self.linear, self.w0 = nn.Linear(i, o), w0
        bound = math.sqrt(6 / i) / w0
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x):
        return torch.sin(self.w0 * self.linear(x))


class Siren(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(3))
        self.net = nn.Sequential(Sine(2 + 2 * 2 * 3, 16), Sine(16, 16, w0=1.0))
        self.final = nn.Linear(16, 3)

    def forward(self, coords):
        angles = (coords[..., None] * self.bands * math.pi).flatten(-2)
        x = torch.cat([coords, angles.sin(), angles.cos()], dim=-1)
        return self.final(self.net(x))


class SineLayer(nnx.Module):
    def __init__(self, i, o, w0, rngs):
        limit = np.sqrt(6 / i) / w0
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -limit, limit)  # noqa: E731
        self.dense, self.w0 = nnx.Linear(i, o, kernel_init=init, rngs=rngs), w0

    def __call__(self, x):
        return jnp.sin(self.w0 * self.dense(x))


class Port(nnx.Module):
    bands = np.array([1.0, 2.0, 4.0])

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = SineLayer(14, 16, 30.0, rngs), SineLayer(16, 16, 1.0, rngs)
        self.rgb = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, coords):
        angles = (np.pi * coords[..., None] * self.bands).reshape(*coords.shape[:-1], -1)
        x = jnp.concatenate([coords, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.rgb(self.second(self.first(x)))


net, port = Siren, Port


def make(rng):
    return rng.uniform(-1, 1, size=(5, 3, 2))


FAULTS = [
    (
        "frequency of the second layer",
        "SineLayer(16, 16, 1.0, rngs)",
        "SineLayer(16, 16, 30.0, rngs)",
        "second|net.1",
        "30",
    ),
    (
        "cosines first",
        "jnp.sin(angles), jnp.cos(angles)]",
        "jnp.cos(angles), jnp.sin(angles)]",
        "Siren",
        "parts in the order 1, 3, 2",
    ),
]
