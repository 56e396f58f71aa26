"""A contrastive pair of towers with unit vectors, a learned temperature and two inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

V, D, T = 21, 10, 6


class CLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.GELU(), nn.LayerNorm(16)
        )
        self.token_embedding = nn.Embedding(V, D)
        self.positional_embedding = nn.Parameter(torch.empty(T, D).normal_(std=0.01))
        self.ln_final = nn.LayerNorm(D)
        self.visual_projection = nn.Parameter(torch.randn(16, 8))
        self.text_projection = nn.Parameter(torch.randn(D, 8))
        self.logit_scale = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))

    def forward(self, image, text):
        x = self.ln_final(self.token_embedding(text) + self.positional_embedding)
        x = x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection
        y = self.visual(image) @ self.visual_projection
        x, y = (z / z.norm(dim=-1, keepdim=True) for z in (x, y))
        logits = self.logit_scale.exp() * y @ x.t()
        return logits, logits.t()


class TextTower(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(V, D, rngs=rngs)
        self.positions = nnx.Param(0.01 * jax.random.normal(rngs.params(), (1, T, D)))
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.proj = nnx.Linear(D, 8, use_bias=False, rngs=rngs)

    def __call__(self, text):
        x = self.norm(self.tokens(text) + self.positions[...])
        end = jnp.argmax(text, axis=-1)[:, None, None]
        return self.proj(jnp.take_along_axis(x, end, axis=1)[:, 0])


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.text_model, self.hidden = TextTower(rngs), nnx.Linear(48, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, epsilon=1e-5, rngs=rngs)
        self.image_proj = nnx.Linear(16, 8, use_bias=False, rngs=rngs)
        self.temperature = nnx.Param(jnp.array([np.log(1 / 0.07)]))

    def __call__(self, image, text):
        y = jax.nn.gelu(self.hidden(image.reshape(len(image), -1)), approximate=False)
        y, x = self.image_proj(self.norm(y)), self.text_model(text)
        x, y = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))
        logits = jnp.exp(self.temperature[...]) * jnp.einsum("id,td->it", y, x)
        return logits, logits.T


net, port = CLIP, Port


def make(rng):
    return rng.random((3, 3, 4, 4)), rng.integers(0, V, (3, T))


FAULTS = [
    (
        "last token",
        "jnp.argmax(text, axis=-1)",
        "jnp.full((len(text),), T - 1)",
        "CLIP|text_model",
        "the last along axis 1",
    ),
    ("GELU of jax", ", approximate=False", "", "CLIP|visual", "gelu"),
    (
        "epsilon of Flax",
        "nnx.LayerNorm(16, epsilon=1e-5, rngs",
        "nnx.LayerNorm(16, rngs",
        "norm|visual.3",
        "1e-06",
    ),
]
