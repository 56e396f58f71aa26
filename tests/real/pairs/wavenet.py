"""Dilated causal convolutions with weight norm, gates and skips; the norm is the port's own."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

C, S, K = 6, 5, 2


class Layer(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        self.pad = dilation * (K - 1)
        self.dilated = weight_norm(nn.Conv1d(C, 2 * C, K, dilation=dilation))
        self.residual, self.skip = nn.Conv1d(C, C, 1), nn.Conv1d(C, S, 1)

    def forward(self, x):
        a, b = self.dilated(nn.functional.pad(x, (self.pad, 0))).chunk(2, dim=1)
        z = torch.tanh(a) * torch.sigmoid(b)
        return x + self.residual(z), self.skip(z)


class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(1, C, 1), nn.Conv1d(S, 9, 1)
        self.layers = nn.ModuleList(Layer(2**n) for n in range(3))

    def forward(self, wave):
        x, skips = self.first(wave), 0
        for layer in self.layers:
            x, skip = layer(x)
            skips = skips + skip
        return self.last(torch.relu(skips))


class WNConv(nnx.Module):
    def __init__(self, dilation, rngs):
        self.v = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (K, C, 2 * C)))
        self.g, self.b = nnx.Param(jnp.ones(2 * C)), nnx.Param(jnp.zeros(2 * C))
        self.dilation = dilation

    def __call__(self, x):
        w = self.g[...] * self.v[...] / jnp.linalg.norm(self.v[...], axis=(0, 1), keepdims=True)
        pads, axes = [(self.dilation * (K - 1), 0)], ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(
            x, w, (1,), pads, rhs_dilation=(self.dilation,), dimension_numbers=axes
        )
        return y + self.b[...]


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.start, self.end = nnx.Linear(1, C, rngs=rngs), nnx.Linear(S, 9, rngs=rngs)
        self.convs = nnx.List([WNConv(2**n, rngs) for n in range(3)])
        self.residuals = nnx.List([nnx.Linear(C, C, rngs=rngs) for _ in range(3)])
        self.skips = nnx.List([nnx.Linear(C, S, rngs=rngs) for _ in range(3)])

    def __call__(self, wave):
        x, total = self.start(wave.swapaxes(1, 2)), 0.0
        for conv, residual, skip in zip(self.convs, self.residuals, self.skips, strict=True):
            a, b = jnp.split(conv(x), 2, axis=-1)
            z = jnp.tanh(a) * jax.nn.sigmoid(b)
            x, total = x + residual(z), total + skip(z)
        return self.end(jax.nn.relu(total)).swapaxes(1, 2)


net, port = WaveNet, Port


def make(rng):
    return rng.normal(size=(2, 1, 12))


FAULTS = [
    (
        "gates swapped",
        "a, b = jnp.split(conv(x)",
        "b, a = jnp.split(conv(x)",
        "layers.0|WaveNet",
        "parts in the order|order",
    ),
    (
        "dilation forgotten",
        "WNConv(2**n, rngs)",
        "WNConv(1, rngs)",
        "convs.1|layers.1.dilated",
        "a dilation of 1",
    ),
    (
        "norm of an axis alone",
        "axis=(0, 1), keepdims",
        "axis=1, keepdims",
        "convs.0|layers.0.dilated",
        "the norm over axis 1 alone",
    ),
]
