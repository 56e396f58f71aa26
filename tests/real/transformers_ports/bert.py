"""BERT of transformers, with two outputs, against a port on nnx.MultiHeadAttention."""

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

V, D, N, F = 23, 12, 3, 20


def net():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=N,
            intermediate_size=F,
            max_position_embeddings=16,
            attn_implementation="eager",
        )
    )


def norm(rngs):
    return nnx.LayerNorm(D, epsilon=1e-12, dtype=jnp.float32, rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(N, D, decode=False, rngs=rngs)
        self.attention_norm, self.output_norm = norm(rngs), norm(rngs)
        self.intermediate, self.output = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x, mask):
        x = self.attention_norm(x + self.attention(x, mask=mask)).astype(x.dtype)
        y = self.output(jax.nn.gelu(self.intermediate(x), approximate=False))
        return self.output_norm(x + y).astype(x.dtype)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.word, self.position, self.type = (nnx.Embed(n, D, rngs=rngs) for n in (V, 16, 2))
        self.embed_norm, self.pooler = norm(rngs), nnx.Linear(D, D, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, input_ids, attention_mask, token_type_ids):
        positions = jnp.arange(input_ids.shape[1])[None]
        x = self.word(input_ids) + self.position(positions) + self.type(token_type_ids)
        x = self.embed_norm(x).astype(x.dtype)
        for layer in self.layers:
            x = layer(x, attention_mask[:, None, None, :] > 0)
        return {"last_hidden_state": x, "pooler_output": jnp.tanh(self.pooler(x[:, 0]))}


port = Port


def make(rng):
    ids, lengths = rng.integers(1, V, (2, 7)), rng.integers(3, 8, (2, 1))
    mask, types = (np.arange(7) < lengths).astype(int), (np.arange(7) > 3).astype(int)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.broadcast_to(types, (2, 7)).copy(),
    }


FAULTS = [
    (
        "GELU of jax",
        ", approximate=False",
        "",
        "encoder.layer.0|encoder.layer.0.intermediate",
        "gelu",
    ),
    ("epsilon 1e-6", "epsilon=1e-12", "epsilon=1e-6", "embed_norm|embeddings.LayerNorm", "1e-06"),
    (
        "pooler without tanh",
        "jnp.tanh(self.pooler(x[:, 0]))",
        "self.pooler(x[:, 0])",
        "pooler|BertModel",
        "no activation|left out",
    ),
]
