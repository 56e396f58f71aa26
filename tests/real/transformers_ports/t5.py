"""T5 of transformers against a port with its own buckets."""

import math

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

V, D, H, F, N, BUCKETS, FAR = 23, 12, 5, 20, 2, 8, 20


def net():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=D,
            d_kv=H,
            d_ff=F,
            num_layers=2,
            num_heads=N,
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=FAR,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


class LayerNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(D))

    def __call__(self, x):
        variance = jnp.mean(jax.lax.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        return self.scale[...] * (x * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


class RelativeBias(nnx.Module):
    def __init__(self, both, rngs):
        self.table, self.both = nnx.Embed(BUCKETS, N, rngs=rngs), both

    def __call__(self, t):
        distance = jnp.arange(t)[None, :] - jnp.arange(t)[:, None]
        count = BUCKETS // 2 if self.both else BUCKETS
        offset = (distance > 0) * count if self.both else 0
        near = jnp.abs(distance) if self.both else jnp.maximum(-distance, 0)
        exact = count // 2
        far = jnp.log(jnp.maximum(near, 1) / exact) / math.log(FAR / exact) * (count - exact)
        far = jnp.minimum(exact + far.astype(int), count - 1)
        bias = self.table(offset + jnp.where(near < exact, near, far)).transpose(2, 0, 1)
        if self.both:
            return bias
        return jnp.where(distance <= 0, bias, jnp.finfo(bias.dtype).min)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.query, self.key, self.value = (
            nnx.LinearGeneral(D, (N, H), use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral((N, H), D, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x, memory, bias=0.0):
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        probs = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) + bias, axis=-1)
        return self.out(jnp.einsum("bnts,bsnh->btnh", probs, v))


class Layer(nnx.Module):
    def __init__(self, decoder, rngs):
        self.self_attention, self.norm1, self.norm2 = Attention(rngs), LayerNorm(), LayerNorm()
        self.wi = nnx.Linear(D, F, use_bias=False, rngs=rngs)
        self.wo = nnx.Linear(F, D, use_bias=False, rngs=rngs)
        if decoder:
            self.cross_attention, self.norm_cross = Attention(rngs), LayerNorm()

    def __call__(self, x, bias, memory=None):
        y = self.norm1(x)
        x = x + self.self_attention(y, y, bias)
        if memory is not None:
            x = x + self.cross_attention(self.norm_cross(x), memory)
        return x + self.wo(jax.nn.relu(self.wi(self.norm2(x))))


class Stack(nnx.Module):
    def __init__(self, decoder, rngs):
        self.bias = RelativeBias(not decoder, rngs)
        self.layers = nnx.List([Layer(decoder, rngs) for _ in range(2)])
        self.norm = LayerNorm()

    def __call__(self, x, memory=None):
        bias = self.bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias, memory)
        return self.norm(x)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.token_embed = nnx.Embed(V, D, rngs=rngs)
        self.encoder, self.decoder = Stack(False, rngs), Stack(True, rngs)

    def __call__(self, input_ids, decoder_input_ids):
        memory = self.encoder(self.token_embed(input_ids))
        x = self.decoder(self.token_embed(decoder_input_ids), memory)
        logits = self.token_embed.attend(x * D**-0.5)
        return {"logits": logits, "encoder_last_hidden_state": memory}


port = Port


def make(rng):
    ids = rng.integers(1, V, (2, 16))
    return {"input_ids": ids[:, :9], "decoder_input_ids": ids[:, 9:]}


FAULTS = [
    (
        "attention scaled",
        "q, k) + bias",
        "q, k) * H**-0.5 + bias",
        "encoder.block.0.layer.0.SelfAttention",
        "a scale of 5**-0.5|= 5**-0.5",
    ),
    (
        "gelu",
        "jax.nn.relu",
        "jax.nn.gelu",
        "encoder|encoder.block.0|encoder.block.0.layer.1.DenseReluDense",
        "gelu with tanh",
    ),
    ("logits not scaled", "x * D**-0.5", "x", "T5ForConditionalGeneration", "a scale of 1 "),
]
