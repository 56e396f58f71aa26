"""torch.nn.LSTM against cells written out over time."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.LSTM(5, 6, batch_first=True)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class LSTM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.ih = nnx.Linear(5, 24, rngs=rngs)
        self.hh = nnx.Linear(6, 24, rngs=rngs)

    def __call__(self, x):
        def step(carry, gates):
            h, c = carry
            i, f, g, o = jnp.split(gates + self.hh(h), 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((len(x), 6), x.dtype)
        _, h = jax.lax.scan(step, (zeros, zeros), self.ih(x).swapaxes(0, 1))
        return h.swapaxes(0, 1)


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.rnn = LSTM(rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x))


def torch_net() -> torch.nn.Module:
    return TorchNet()


def flax_net() -> nnx.Module:
    return FlaxNet(nnx.Rngs(0))


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(2, 4, 5))
