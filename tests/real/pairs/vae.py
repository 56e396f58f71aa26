"""A variational autoencoder with noise as an input and three outputs in a named tuple."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

X, H, Z = 14, 10, 3


class VAEOutput(NamedTuple):
    reconstruction: torch.Tensor
    mu: torch.Tensor
    log_var: torch.Tensor


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(X, H), nn.ReLU())
        self.fc_mu, self.fc_var = nn.Linear(H, Z), nn.Linear(H, Z)
        self.decoder = nn.Sequential(nn.Linear(Z, H), nn.ReLU(), nn.Linear(H, X), nn.Sigmoid())

    def forward(self, x, noise):
        h = self.encoder(x)
        mu, log_var = self.fc_mu(h), self.fc_var(h)
        z = mu + noise * torch.exp(0.5 * log_var)
        return VAEOutput(self.decoder(z), mu, log_var)


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(X, H, rngs=rngs)
        self.mean, self.logvar = nnx.Linear(H, Z, rngs=rngs), nnx.Linear(H, Z, rngs=rngs)

    def __call__(self, x):
        h = jax.nn.relu(self.hidden(x))
        return self.mean(h), self.logvar(h)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.enc = Encoder(rngs)
        self.dec1, self.dec2 = nnx.Linear(Z, H, rngs=rngs), nnx.Linear(H, X, rngs=rngs)

    def __call__(self, x, noise):
        mean, logvar = self.enc(x)
        z = mean + jnp.sqrt(jnp.exp(logvar)) * noise
        return jax.nn.sigmoid(self.dec2(jax.nn.relu(self.dec1(z)))), mean, logvar


net, port = VAE, Port


def make(rng):
    return rng.random((4, X)), rng.normal(size=(4, Z))


FAULTS = [
    (
        "deviation from the variance",
        "jnp.sqrt(jnp.exp(logvar))",
        "jnp.exp(logvar)",
        "VAE|dec1|decoder",
        "a scale of 1 (mul",
    ),
    (
        "outputs swapped",
        "self.dec1(z)))), mean, logvar",
        "self.dec1(z)))), logvar, mean",
        "VAE",
        "outputs 1 and 2 exchanged",
    ),
    (
        "output without sigmoid",
        "jax.nn.sigmoid(self",
        "(self",
        "VAE|decoder|decoder.3",
        "no activation|left out",
    ),
]
