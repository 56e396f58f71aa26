"""An Equinox module, whose arrays a small NNX module holds and gives back to it at every call."""

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.layers = nn.ModuleList([nn.Linear(5 * 16, 12), nn.Linear(12, 12), nn.Linear(12, 3)])

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        for layer in self.layers[:-1]:
            x = nn.functional.elu(layer(x))
        return self.layers[-1](x)


class Model(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    mlp: list

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.conv = eqx.nn.Conv2d(2, 5, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.GroupNorm(1, 5, eps=1e-5)
        sizes = zip((80, 12, 12), (12, 12, 3), keys[1:], strict=True)
        self.mlp = [eqx.nn.Linear(i, o, key=key) for i, o, key in sizes]

    def __call__(self, x):
        x = jax.nn.relu(self.norm(self.conv(x))).reshape(-1)
        for layer in self.mlp[:-1]:
            x = jax.nn.elu(layer(x))
        return self.mlp[-1](x)


class Adapter(nnx.Module):
    def __init__(self, module):
        arrays, self.static = eqx.partition(module, eqx.is_inexact_array)
        leaves, self.treedef = jax.tree.flatten_with_path(arrays)
        keys = (jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in leaves)
        self.names = tuple(keys)  # in the order of the tree: nnx sorts the keys of a Dict
        self.weights = nnx.Dict(zip(self.names, (nnx.Param(x) for _, x in leaves), strict=True))

    def __call__(self, *inputs):
        arrays = jax.tree.unflatten(self.treedef, [self.weights[name][...] for name in self.names])
        return jax.vmap(eqx.combine(arrays, self.static))(*map(jnp.asarray, inputs))


def port():
    return Adapter(Model(jax.random.key(0)))


net = Net


def make(rng):
    return rng.normal(size=(3, 2, 4, 4))


FAULTS = [
    ("silu in place of elu", "jax.nn.elu(layer(x))", "jax.nn.silu(layer(x))", "Net", "silu"),
    ("epsilon 1e-6", "eps=1e-5", "eps=1e-6", "norm|Net", "1e-06"),
]
