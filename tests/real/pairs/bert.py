"""An encoder with token types, a padding mask, a pooler and outputs in a dataclass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

V, D, N, T = 23, 12, 3, 10


@dataclasses.dataclass
class Output:
    last_hidden_state: object
    pooler_output: object
    attentions: object = None


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(V, D, padding_idx=0)
        self.position_embeddings = nn.Embedding(T, D)
        self.token_type_embeddings = nn.Embedding(2, D)
        self.LayerNorm, self.dropout = nn.LayerNorm(D, eps=1e-12), nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(T).expand((1, -1)))

    def forward(self, input_ids, token_type_ids):
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(self.position_ids[:, : input_ids.shape[1]])
        return self.dropout(self.LayerNorm(x))


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = Embeddings()
        self.query, self.key, self.value, self.dense = (nn.Linear(D, D) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-12), nn.LayerNorm(D, eps=1e-12)
        self.intermediate, self.output, self.pooler = (
            nn.Linear(D, 20),
            nn.Linear(20, D),
            nn.Linear(D, D),
        )

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        x = self.embeddings(input_ids, token_type_ids)
        q, k, v = (
            f(x).unflatten(-1, (N, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        extended = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        probs = torch.softmax(q @ k.mT / (D // N) ** 0.5 + extended, dim=-1)
        x = self.norm1(x + self.dense((probs @ v).transpose(1, 2).flatten(2)))
        x = self.norm2(x + self.output(nn.functional.gelu(self.intermediate(x))))
        return Output(x, torch.tanh(self.pooler(x[:, 0])), (probs,))


class SelfAttention(nnx.Module):
    def __init__(self, rngs):
        self.query, self.key, self.value = (
            nnx.LinearGeneral(D, (N, D // N), rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral((N, D // N), D, axis=(-2, -1), rngs=rngs)

    def __call__(self, x, bias):
        q, k, v = self.query(x), self.key(x), self.value(x)
        probs = jax.nn.softmax(
            jnp.einsum("bqnh,bknh->bnqk", q, k) / (D // N) ** 0.5 + bias, axis=-1
        )
        return self.out(jnp.einsum("bnqk,bknh->bqnh", probs, v)), probs


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        norm = dict(epsilon=1e-12, use_fast_variance=False, rngs=rngs)
        self.words, self.positions, self.types = (nnx.Embed(n, D, rngs=rngs) for n in (V, T, 2))
        self.ln0, self.ln1, self.ln2 = (nnx.LayerNorm(D, **norm) for _ in range(3))
        self.dropout, self.attention = nnx.Dropout(0.1, rngs=rngs), SelfAttention(rngs)
        self.fc1, self.fc2, self.pool = (
            nnx.Linear(D, 20, rngs=rngs),
            nnx.Linear(20, D, rngs=rngs),
            nnx.Linear(D, D, rngs=rngs),
        )

    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        x = self.words(input_ids) + self.types(token_type_ids)
        x = self.dropout(self.ln0(x + self.positions(jnp.arange(x.shape[1])[None])))
        y, probs = self.attention(x, jnp.where(attention_mask == 1, 0.0, -1e9)[:, None, None])
        x = self.ln1(x + y)
        x = self.ln2(x + self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))
        return Output(x, jnp.tanh(self.pool(x[:, 0])), (probs,))


net, port = Bert, Port


def make(rng):
    ids = rng.integers(1, V, (2, 7))
    mask = (np.arange(7) < rng.integers(3, 8, (2, 1))).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 9).astype(np.int64)}


FAULTS = [
    (
        "mask ignored",
        "jnp.where(attention_mask == 1, 0.0, -1e9)",
        "jnp.where(attention_mask == 1, 0.0, 0.0)",
        "Bert",
        "x in place of x + y",
    ),
    ("GELU of jax", ", approximate=False", "", "Bert", "gelu"),
    ("epsilon 1e-5", "epsilon=1e-12", "epsilon=1e-5", "ln0|embeddings.LayerNorm", "1e-05"),
]
