"""An MLP-Mixer: transposed mixing of tokens, kernels of einsum in the port, drop-out in both."""

import jax
import jax.numpy as jnp
from flax import nnx
from torch import nn

D, T = 9, 4


class MlpBlock(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2, self.drop = (
            nn.Linear(dim, hidden),
            nn.Linear(hidden, dim),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return self.fc2(self.drop(nn.functional.gelu(self.fc1(x))))


class MixerLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.token_mlp, self.channel_mlp = MlpBlock(T, 7), MlpBlock(D, 20)

    def forward(self, x):
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.norm2(x))


class MixerNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, D, 3, stride=3)
        self.layers = nn.Sequential(*[MixerLayer() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.stem(x).flatten(2).mT)).mean(1))


class Mix(nnx.Module):
    def __init__(self, spec, size, hidden, rngs):
        normal = nnx.initializers.normal(0.1)
        self.w1, self.w2 = (
            nnx.Param(normal(rngs.params(), s)) for s in ((size, hidden), (hidden, size))
        )
        self.b1, self.b2 = nnx.Param(jnp.zeros(hidden)), nnx.Param(jnp.zeros(size))
        self.tokens, self.dropout = spec == "tokens", nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        into, out = (
            ("btd,tu->bud", "bud,ut->btd") if self.tokens else ("btd,du->btu", "btu,ud->btd")
        )
        b1, b2 = (b[:, None] if self.tokens else b[...] for b in (self.b1, self.b2))
        h = jax.nn.gelu(jnp.einsum(into, x, self.w1[...]) + b1, approximate=False)
        return jnp.einsum(out, self.dropout(h), self.w2[...]) + b2


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(1, D, (3, 3), (3, 3), padding="VALID", rngs=rngs)
        self.tokens = nnx.List([Mix("tokens", T, 7, rngs) for _ in range(2)])
        self.channels = nnx.List([Mix("channels", D, 20, rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs) for _ in range(5)])
        self.head = nnx.Linear(D, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(jnp.moveaxis(x, 1, 3)).reshape(len(x), T, D)
        for n in range(2):
            x = x + self.tokens[n](self.norms[2 * n](x))
            x = x + self.channels[n](self.norms[2 * n + 1](x))
        return self.head(self.norms[4](x).mean(1))


net, port = MixerNet, Port


def make(rng):
    return rng.normal(size=(3, 1, 6, 6))


FAULTS = [
    ("GELU of jax", ", approximate=False", "", "tokens.0|layers.0.token_mlp", "gelu"),
    ("epsilon 1e-6", "epsilon=1e-5", "epsilon=1e-6", "norms.0|layers.0.norm1", "1e-06"),
]
