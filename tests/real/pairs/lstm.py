"""A loop over torch's LSTM cell against nnx.RNN, whose cell has a layer for every gate."""

import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

D, H = 5, 7


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(D, H), nn.Linear(H, 2)

    def forward(self, series):
        h = c = torch.zeros(len(series), H, dtype=series.dtype, device=series.device)
        states = []
        for x in series.unbind(1):
            h, c = self.cell(x, (h, c))
            states.append(h)
        return self.out(torch.stack(states, 1))


class Step(nnx.Module):
    def __init__(self, rngs):
        self.kernel_x = nnx.Linear(D, 4 * H, rngs=rngs)
        self.kernel_h = nnx.Linear(H, 4 * H, rngs=rngs)

    def __call__(self, carry, x):
        h, c = carry
        i, f, g, o = jnp.split(self.kernel_x(x) + self.kernel_h(h), 4, axis=-1)
        c = nnx.sigmoid(f) * c + nnx.sigmoid(i) * nnx.tanh(g)
        h = nnx.sigmoid(o) * nnx.tanh(c)
        return (h, c), h


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.lstm, self.out = Step(rngs), nnx.Linear(H, 2, rngs=rngs)

    def __call__(self, series):
        zero = jnp.zeros((series.shape[0], H), series.dtype)
        run = nnx.scan(
            lambda step, carry, x: step(carry, x),
            in_axes=(None, nnx.Carry, 1),
            out_axes=(nnx.Carry, 1),
        )
        return self.out(run(self.lstm, (zero, zero), series)[1])


net, port = Net, Port


def make(rng):
    return rng.normal(size=(2, 4, D))


FAULTS = [
    (
        "cell and output gate swapped",
        "i, f, g, o = jnp",
        "i, f, o, g = jnp",
        "cell|lstm|Net",
        "order",
    ),
    (
        "forget bias of one",
        "nnx.sigmoid(f) * c",
        "nnx.sigmoid(f + 1.0) * c",
        "cell|lstm|Net",
        "1 added to part 2 of 4",
    ),
]
