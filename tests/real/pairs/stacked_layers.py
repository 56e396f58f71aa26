"""Post-norm blocks in one array per weight, made by nnx.vmap and run by nnx.scan with remat."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

D, L = 10, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)
        self.ln, self.alpha = nn.LayerNorm(D), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.ln(x * self.alpha + self.fc_out(nn.functional.silu(self.fc_in(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, D)
        self.h = nn.ModuleList([Block() for _ in range(L)])
        self.value = nn.Linear(D, 1)

    def forward(self, x):
        x = self.embed(x)
        for block in self.h:
            x = block(x)
        return self.value(x).squeeze(-1)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.wi, self.wo = nnx.Linear(D, 3 * D, rngs=rngs), nnx.Linear(3 * D, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.alpha = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.norm(x * self.alpha[...] + self.wo(jax.nn.silu(self.wi(x))))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(4, D, rngs=rngs)
        self.layers = nnx.vmap(Layer, in_axes=0)(rngs.fork(split=L))
        self.value = nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return layer(x)

        return self.value(run(self.layers, self.embed(x)))[..., 0]


net, port = Net, Port


def make(rng):
    return rng.normal(size=(5, 4))


FAULTS = [
    (
        "epsilon of Flax",
        "D, epsilon=1e-5, rngs",
        "D, rngs",
        "layers|layers.norm|h.0|h.0.ln|Net|layers.0|layers.0.norm",
        "1e-06",
    ),
    (
        "no scale of the residual",
        "x * self.alpha[...]",
        "x + 0 * self.alpha[...]",
        "layers|h.0|Net|layers.0",
        "x in place of x * y",
    ),
    ("gelu", "jax.nn.silu", "jax.nn.gelu", "layers|h.0|Net|layers.0", "gelu with tanh"),
]
