"""A graph convolution with an adjacency of booleans as its second input."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn


class GraphConv(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.lin = nn.Linear(i, o, bias=False)
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, x, adj):
        a = adj.float() + torch.eye(adj.shape[-1])
        scale = a.sum(-1).rsqrt()
        return (scale[:, None] * a * scale[None, :]) @ self.lin(x).float() + self.bias


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = GraphConv(5, 8), GraphConv(8, 3)

    def forward(self, x, adj):
        h = nn.functional.leaky_relu(self.conv1(x, adj), 0.2)
        h = self.conv2(h, adj)
        return torch.log_softmax(h, dim=1), h.mean(0)


class Layer(nnx.Module):
    def __init__(self, i, o, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (i, o)))
        self.offset = nnx.Param(jnp.zeros((1, o)))

    def __call__(self, nodes, edges):
        degrees = edges.sum(-1, keepdims=True)
        return edges / jnp.sqrt(degrees * degrees.T) @ (nodes @ self.weight[...]) + self.offset[...]


class Port(nnx.Module):
    def __init__(self, rngs: nnx.Rngs | None = None):
        rngs = rngs or nnx.Rngs(0)
        self.layers = nnx.List([Layer(5, 8, rngs=rngs), Layer(8, 3, rngs=rngs)])

    def __call__(self, nodes, edges):
        edges = edges.astype(jnp.float32) + jnp.eye(len(edges))
        hidden = jax.nn.leaky_relu(self.layers[0](nodes, edges), 0.2)
        scores = self.layers[1](hidden, edges)
        return jax.nn.log_softmax(scores, axis=-1), scores.mean(axis=0)


net, port = GCN, Port


def make(rng):
    adj = rng.random((7, 7)) < 0.3
    return rng.normal(size=(7, 5)), (adj | adj.T) & ~np.eye(7, dtype=bool)


FAULTS = [
    (
        "slope of jax",
        "self.layers[0](nodes, edges), 0.2)",
        "self.layers[0](nodes, edges))",
        "GCN",
        "0.01|slope",
    ),
    ("no loops", " + jnp.eye(len(edges))", " + 1e-6", "layers.0|conv1|GCN", None),
    ("softmax without logarithm", "jax.nn.log_softmax", "jax.nn.softmax", "GCN", "softmax"),
]
