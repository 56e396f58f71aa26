"""Two layers of nn.GRU against a scan over a cell that keeps its gates in one bare array."""

import jax
import jax.numpy as jnp
from flax import nnx
from torch import nn

V, D, H = 13, 6, 8


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.rnn = nn.GRU(D, H, num_layers=2, batch_first=True)
        self.tags = nn.Linear(H, 4)

    def forward(self, words):
        states, last = self.rnn(self.embedding(words))
        return self.tags(states), last


class Cell(nnx.Module):
    def __init__(self, i, h, rngs):
        draw = nnx.initializers.orthogonal()
        self.w = nnx.Param(draw(rngs.params(), (i, 3 * h)))
        self.u = nnx.Param(draw(rngs.params(), (h, 3 * h)))
        self.b_w, self.b_u = nnx.Param(jnp.zeros(3 * h)), nnx.Param(jnp.zeros(3 * h))

    def __call__(self, h, x):
        r_x, z_x, n_x = jnp.split(x @ self.w[...] + self.b_w[...], 3, axis=-1)
        r_h, z_h, n_h = jnp.split(h @ self.u[...] + self.b_u[...], 3, axis=-1)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        n = jnp.tanh(n_x + r * n_h)
        h = (1 - z) * n + z * h
        return h, h


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.cells = nnx.List([Cell(D, H, rngs), Cell(H, H, rngs)])
        self.head = nnx.Linear(H, 4, rngs=rngs)

    def __call__(self, words):
        x, last = self.embed(words).swapaxes(0, 1), []
        for cell in self.cells:
            state, x = jax.lax.scan(cell, jnp.zeros((x.shape[1], H), x.dtype), x)
            last.append(state)
        return self.head(x.swapaxes(0, 1)), jnp.stack(last)


net, port = Tagger, Port


def make(rng):
    return rng.integers(0, V, (3, 5))


FAULTS = [
    (
        "reset before the product",
        "n = jnp.tanh(n_x + r * n_h)",
        "n = jnp.tanh(n_x + (r * h) @ self.u[:, 2 * H :] + self.b_u[2 * H :])",
        "rnn|cells.0|Tagger",
        None,
    ),
    (
        "gates in another order",
        "r_x, z_x, n_x = jnp",
        "z_x, r_x, n_x = jnp",
        "rnn|cells.0|Tagger",
        "fused parts|order",
    ),
]
