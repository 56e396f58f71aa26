"""A compact linen module carried into NNX by its bridge, a part of it under names of its own."""

import jax
import jax.numpy as jnp
from flax import linen, nnx
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 8, 3)
        )
        self.norm = nn.LayerNorm(8)
        self.classifier = nn.Sequential(nn.Linear(8 * 3, 9), nn.Tanh(), nn.Linear(9, 4))

    def forward(self, x):
        x = self.norm(self.features(x).transpose(1, 2))
        return self.classifier(x.flatten(1))


class Features(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Conv(6, kernel_size=(3,), padding=1)(x))
        x = linen.max_pool(x, window_shape=(2,), strides=(2,))
        return linen.Conv(8, kernel_size=(3,), padding="VALID")(x)


class Model(linen.Module):
    width: int = 9

    @linen.compact
    def __call__(self, x):
        x = Features()(x.swapaxes(1, 2))
        x = linen.LayerNorm(epsilon=1e-5)(x).reshape(len(x), -1)
        x = jnp.tanh(linen.Dense(self.width, name="hidden")(x))
        return linen.Dense(4, name="logits")(x)


def port():
    return nnx.bridge.ToNNX(Model(), rngs=nnx.Rngs(0)).lazy_init(jnp.zeros((1, 3, 10)))


net = Net


def make(rng):
    return rng.normal(size=(2, 3, 10))


FAULTS = [
    (
        "relu left out",
        "x = jax.nn.relu(linen.Conv(6, kernel_size=(3,), padding=1)(x))",
        "x = linen.Conv(6, kernel_size=(3,), padding=1)(x)",
        "Features_0|features|Net",
        "no activation",
    ),
    ("epsilon of linen", "epsilon=1e-5", "", "LayerNorm_0|norm", "1e-06"),
    (
        "channels in the flat axis",
        "(x).reshape(len(x), -1)",
        "(x).swapaxes(1, 2).reshape(len(x), -1)",
        "Net|classifier",
        "channels|flat",
    ),
]
