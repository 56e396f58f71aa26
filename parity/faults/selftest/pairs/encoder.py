"""torch.nn.TransformerEncoder against a port on nnx.MultiHeadAttention."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx


def torch_net() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def attend(query, key, value, *args, **kwargs):
    # jax's own attention takes its softmax in float32, whatever the type.
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.self_attn = nnx.MultiHeadAttention(3, 12, attention_fn=attend, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(12, 20, rngs=rngs)
        self.linear2 = nnx.Linear(20, 12, rngs=rngs)
        self.norm1 = nnx.LayerNorm(12, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(12, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x):
        x = self.norm1(x + self.self_attn(x))
        return self.norm2(x + self.linear2(jax.nn.relu(self.linear1(x))))


class FlaxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def flax_net() -> nnx.Module:
    return FlaxNet(nnx.Rngs(0))


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(2, 4, 12))
