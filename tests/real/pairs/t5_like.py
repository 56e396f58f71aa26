"""An encoder and a decoder with relative position bias, keyword inputs and tied embeddings."""

import math

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

V, D, N, H = 17, 12, 2, 4


class T5Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6)).to(x.dtype)


class T5Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, N * H, bias=False) for _ in range(3))
        self.o = nn.Linear(N * H, D, bias=False)

    def forward(self, x, memory, bias):
        split = lambda y: y.view(*y.shape[:2], N, H).transpose(1, 2)  # noqa: E731
        scores = split(self.q(x)) @ split(self.k(memory)).mT + bias
        y = scores.float().softmax(-1).type_as(scores) @ split(self.v(memory))
        return self.o(y.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self, is_decoder):
        super().__init__()
        self.is_decoder, self.relative_attention_bias = is_decoder, nn.Embedding(8, N)
        self.norms = nn.ModuleList(T5Norm() for _ in range(3 + is_decoder))
        self.attentions = nn.ModuleList(T5Attention() for _ in range(1 + is_decoder))
        self.wi, self.wo = nn.Linear(D, 18, bias=False), nn.Linear(18, D, bias=False)

    def forward(self, x, memory=None):
        t = torch.arange(x.shape[1])
        d = t[None, :] - t[:, None]
        n = (-d).clamp(min=0) if self.is_decoder else d.abs()
        bucket = n.clamp(max=7) if self.is_decoder else n.clamp(max=3) + 4 * (d > 0)
        bias = self.relative_attention_bias(bucket).permute(2, 0, 1)
        if self.is_decoder:
            bias = bias.masked_fill(d > 0, torch.finfo(bias.dtype).min)
        y = self.norms[0](x)
        x = x + self.attentions[0](y, y, bias)
        if self.is_decoder:
            x = x + self.attentions[1](self.norms[2](x), memory, 0.0)
        x = x + self.wo(torch.relu(self.wi(self.norms[1](x))))
        return self.norms[-1](x)


class T5(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.encoder, self.decoder = nn.Embedding(V, D), Stack(False), Stack(True)

    def forward(self, input_ids, decoder_input_ids):
        memory = self.encoder(self.shared(input_ids))
        x = self.decoder(self.shared(decoder_input_ids), memory)
        return (x * D**-0.5) @ self.shared.weight.T, memory


class RMS(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        variance = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return self.weight[...] * (x * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.Linear(D, N * H, use_bias=False, rngs=rngs) for _ in range(3))
        self.o = nnx.Linear(N * H, D, use_bias=False, rngs=rngs)

    def __call__(self, x, memory, bias):
        q, k, v = (
            f(y).reshape(*y.shape[:2], N, H)
            for f, y in zip((self.q, self.k, self.v), (x, memory, memory), strict=True)
        )
        weights = jax.nn.softmax((jnp.einsum("btnh,bsnh->bnts", q, k) + bias).astype(jnp.float32))
        y = jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)
        return self.o(y.reshape(*y.shape[:2], N * H))


class Half(nnx.Module):
    def __init__(self, causal, rngs):
        self.causal, self.rel_bias = causal, nnx.Embed(8, N, rngs=rngs)
        self.self_attn, self.norm_self = Attention(rngs), RMS()
        if causal:
            self.cross_attn, self.norm_cross = Attention(rngs), RMS()
        self.norm_mlp, self.norm_out = RMS(), RMS()
        self.wi = nnx.Linear(D, 18, use_bias=False, rngs=rngs)
        self.wo = nnx.Linear(18, D, use_bias=False, rngs=rngs)

    def __call__(self, x, memory=None):
        t = jnp.arange(x.shape[1])
        d = t[None, :] - t[:, None]
        small = jnp.minimum(jnp.maximum(-d, 0), 7)
        both = jnp.minimum(jnp.abs(d), 3) + jnp.where(d > 0, 4, 0)
        bias = self.rel_bias(small if self.causal else both).transpose(2, 0, 1)
        if self.causal:
            bias = jnp.where(d > 0, -jnp.inf, bias)
        y = self.norm_self(x)
        x = x + self.self_attn(y, y, bias)
        if self.causal:
            x = x + self.cross_attn(self.norm_cross(x), memory, 0.0)
        return self.norm_out(x + self.wo(jax.nn.relu(self.wi(self.norm_mlp(x)))))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.enc, self.dec = (
            nnx.Embed(V, D, rngs=rngs),
            Half(False, rngs),
            Half(True, rngs),
        )

    def __call__(self, input_ids, decoder_input_ids):
        memory = self.enc(self.embed(input_ids))
        x = self.dec(self.embed(decoder_input_ids), memory)
        return self.embed.attend(x / math.sqrt(D)), memory


net, port = T5, Port


def make(rng):
    ids = rng.integers(0, V, (2, 13))
    return {"input_ids": ids[:, :8], "decoder_input_ids": ids[:, 8:]}


FAULTS = [
    (
        "attention scaled",
        'jnp.einsum("btnh,bsnh->bnts", q, k) + bias',
        'jnp.einsum("btnh,bsnh->bnts", q, k) / 2 + bias',
        "enc.self_attn|encoder.attentions.0|attentions.0",
        "a scale of",
    ),
    (
        "one bucket less",
        "jnp.minimum(jnp.abs(d), 3)",
        "jnp.minimum(jnp.abs(d), 2)",
        "enc|encoder",
        "max=2 in clamp",
    ),
    ("tied head not scaled", "x / math.sqrt(D)", "x", "T5", "a scale of 1 "),
]
