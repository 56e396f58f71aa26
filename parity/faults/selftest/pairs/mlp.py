"""A perceptron whose layers are in a Sequential on one side and named on the other."""

import jax
import numpy as np
import torch
from flax import nnx


def torch_net() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.GELU(),
        torch.nn.Linear(7, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3),
    )  # fmt: skip


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(5, 7, rngs=rngs)
        self.norm = nnx.LayerNorm(7, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.mix = nnx.Linear(7, 7, rngs=rngs)
        self.down = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.gelu(self.norm(self.up(x)), approximate=False)
        return self.down(jax.numpy.tanh(self.mix(x)))


def flax_net() -> nnx.Module:
    return FlaxNet(nnx.Rngs(0))


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(4, 5))
