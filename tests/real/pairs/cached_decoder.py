"""A decoder with its past as keyword inputs and an output that is a mapping with attributes."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import torch
from flax import nnx, struct
from torch import nn

V, D, N = 16, 12, 2


class ModelOutput(OrderedDict):
    def __getattr__(self, name):
        return self[name]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(12, D)
        self.ln_1, self.ln_f = nn.LayerNorm(D), nn.LayerNorm(D)
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids, past_key=None, past_value=None, use_cache=True):
        start, t = past_key.shape[2], input_ids.shape[1]
        position = torch.arange(start, start + t)
        x = self.wte(input_ids) + self.wpe(position)
        qkv = self.c_attn(self.ln_1(x)).split(D, dim=2)
        q, k, v = (y.view(*y.shape[:2], N, D // N).transpose(1, 2) for y in qkv)
        k, v = torch.cat([past_key, k], dim=2), torch.cat([past_value, v], dim=2)
        mask = position[:, None] >= torch.arange(start + t)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.ln_f(x + self.c_proj(y.transpose(1, 2).flatten(2)))
        past = ((k, v),) if use_cache else None
        return ModelOutput(logits=self.lm_head(x), past_key_values=past, hidden_states=(x,))


@struct.dataclass
class Outputs:
    logits: jax.Array
    past_key_values: tuple
    hidden_states: tuple


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tokens, self.positions = nnx.Embed(V, D, rngs=rngs), nnx.Embed(12, D, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.qkv = nnx.LinearGeneral(D, (3, N, D // N), rngs=rngs)
        self.out = nnx.LinearGeneral((N, D // N), D, axis=(-2, -1), rngs=rngs)

    def __call__(self, input_ids, past_key=None, past_value=None):
        start, t = past_key.shape[2], input_ids.shape[1]
        position = start + jnp.arange(t)
        x = self.tokens(input_ids) + self.positions(position)
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)), (2, 3), (0, 2))
        k, v = jnp.concatenate([past_key, k], 2), jnp.concatenate([past_value, v], 2)
        scores = jnp.einsum("bnth,bnsh->bnts", q, k) * (D // N) ** -0.5
        scores = jnp.where(position[:, None] >= jnp.arange(start + t), scores, -jnp.inf)
        x = x + self.out(jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores, -1), v))
        x = self.norm2(x)
        return Outputs(self.tokens.attend(x), ((k, v),), (x,))


net, port = Decoder, Port


def make(rng):
    past = rng.normal(size=(2, 2, N, 4, D // N))
    return {"input_ids": rng.integers(0, V, (2, 3)), "past_key": past[0], "past_value": past[1]}


FAULTS = [
    (
        "positions from zero",
        "self.positions(position)",
        "self.positions(jnp.arange(t))",
        "Decoder|positions|wpe",
        "ids -4|ids shifted by -4|from zero",
    ),
    ("epsilon 1e-6", "epsilon=1e-5", "epsilon=1e-6", "norm1|ln_1", "1e-06"),
    (
        "past behind the new",
        "jnp.concatenate([past_key, k], 2)",
        "jnp.concatenate([k, past_key], 2)",
        "Decoder",
        "reverse order (cat",
    ),
]
