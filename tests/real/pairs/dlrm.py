"""Recommendation: tables of embeddings of several sizes, dense features, products of all pairs."""

import itertools

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

SIZES, D = (11, 5, 7), 6


def mlp(*sizes):
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb_l = nn.ModuleList([nn.EmbeddingBag(n, D, mode="sum") for n in SIZES])
        self.bot_l, self.top_l = mlp(4, 9, D), mlp(D + 6, 8)
        self.click = nn.Linear(8, 1)

    def forward(self, dense_x, sparse_x):
        x = self.bot_l(dense_x)
        ly = [bag(sparse_x[:, n]) for n, bag in enumerate(self.emb_l)]
        t = torch.stack([x, *ly], dim=1)
        i, j = torch.tril_indices(4, 4, offset=-1)
        z = torch.bmm(t, t.transpose(1, 2))[:, i, j]
        return torch.sigmoid(self.click(self.top_l(torch.cat([x, z], dim=1)))).flatten()


class Tower(nnx.Module):
    def __init__(self, sizes, rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairs])

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return x


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tables = nnx.Dict(
            {f"feature_{n}": nnx.Embed(s, D, rngs=rngs) for n, s in enumerate(SIZES)}
        )
        self.bottom, self.top = Tower((4, 9, D), rngs), Tower((D + 6, 8), rngs)
        self.click = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, dense, ids):
        x = self.bottom(dense)
        found = [self.tables[f"feature_{n}"](ids[:, n]).sum(axis=1) for n in range(len(SIZES))]
        every = jnp.stack([x, *found], axis=1)
        products = jnp.einsum("bnd,bmd->bnm", every, every)
        rows, columns = jnp.tril_indices(4, -1)
        x = jnp.concatenate([x, products[:, rows, columns]], axis=1)
        return jax.nn.sigmoid(self.click(self.top(x)))[:, 0]


net, port = DLRM, Port


def make(rng):
    return rng.random((4, 4)), rng.integers(0, 5, (4, 3, 2))


FAULTS = [
    (
        "mean in place of the sum",
        "(ids[:, n]).sum(axis=1)",
        "(ids[:, n]).mean(axis=1)",
        "DLRM|emb_l.0|top|top_l",
        "mode=mean",
    ),
    (
        "upper triangle",
        "products[:, rows, columns]",
        "products[:, columns[::-1], rows[::-1]]",
        "DLRM|top|top_l",
        "back to front (getitem|back to front along axis 1",
    ),
    (
        "no sigmoid",
        "jax.nn.sigmoid(self.click(self.top(x)))",
        "self.click(self.top(x))",
        "DLRM",
        "no activation|left out",
    ),
]
