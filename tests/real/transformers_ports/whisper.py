"""Whisper of transformers, whose sinusoids are frozen and whose head is tied, against a port."""

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

V, D, N, MEL, T, CONTEXT = 23, 12, 2, 6, 8, 10


def net():
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=V,
            num_mel_bins=MEL,
            d_model=D,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=N,
            decoder_attention_heads=N,
            encoder_ffn_dim=20,
            decoder_ffn_dim=18,
            max_source_positions=T,
            max_target_positions=CONTEXT,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.query, self.value, self.out = (nnx.Linear(D, D, rngs=rngs) for _ in range(3))
        self.key = nnx.Linear(D, D, use_bias=False, rngs=rngs)

    def __call__(self, x, memory, causal=False):
        heads = lambda y: y.reshape(*y.shape[:2], N, -1)  # noqa: E731
        q, k, v = heads(self.query(x)), heads(self.key(memory)), heads(self.value(memory))
        mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) if causal else None
        y = nnx.dot_product_attention(q, k, v, mask=mask, deterministic=True)
        return self.out(y.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, hidden, decoder, rngs):
        norm = lambda: nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)  # noqa: E731
        self.attn, self.attn_ln, self.mlp_ln = Attention(rngs), norm(), norm()
        self.mlp1, self.mlp2 = nnx.Linear(D, hidden, rngs=rngs), nnx.Linear(hidden, D, rngs=rngs)
        self.decoder = decoder
        if decoder:
            self.cross_attn, self.cross_attn_ln = Attention(rngs), norm()

    def __call__(self, x, memory=None):
        y = self.attn_ln(x)
        x = x + self.attn(y, y, causal=self.decoder)
        if self.decoder:
            x = x + self.cross_attn(self.cross_attn_ln(x), memory)
        return x + self.mlp2(jax.nn.gelu(self.mlp1(self.mlp_ln(x)), approximate=False))


class AudioEncoder(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(MEL, D, (3,), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(D, D, (3,), strides=2, padding=1, rngs=rngs)
        self.positional_embedding = nnx.Param(jax.random.normal(rngs.params(), (T, D)))
        self.blocks = nnx.List([Block(20, False, rngs)])
        self.ln_post = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, features):
        x = jax.nn.gelu(self.conv1(features.swapaxes(1, 2)), approximate=False)
        x = jax.nn.gelu(self.conv2(x), approximate=False)
        x = x + jax.lax.stop_gradient(self.positional_embedding[...])
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder, self.token_embedding = AudioEncoder(rngs), nnx.Embed(V, D, rngs=rngs)
        self.positional_embedding = nnx.Param(jax.random.normal(rngs.params(), (CONTEXT, D)))
        self.blocks = nnx.List([Block(18, True, rngs) for _ in range(2)])
        self.ln = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, input_features, decoder_input_ids):
        memory = self.encoder(input_features)
        x = self.token_embedding(decoder_input_ids)
        x = x + self.positional_embedding[: x.shape[1]]
        for block in self.blocks:
            x = block(x, memory)
        logits = self.token_embedding.attend(self.ln(x))
        return {"logits": logits, "encoder_last_hidden_state": memory}


port = Port


def make(rng):
    features = rng.normal(size=(2, MEL, 2 * T))
    # From 1 on, for torch has no gradient of the embedding at the padding.
    return {"input_features": features, "decoder_input_ids": rng.integers(1, V, (2, 5))}


FAULTS = [
    (
        "GELU of jax",
        "self.mlp_ln(x)), approximate=False",
        "self.mlp_ln(x))",
        "model.encoder.layers.0",
        "gelu",
    ),
    (
        "padding SAME at stride 2",
        "strides=2, padding=1",
        'strides=2, padding="SAME"',
        "model.encoder.conv2",
        "SAME",
    ),
    (
        "no causal mask",
        "causal=self.decoder",
        "causal=False",
        "model.decoder.layers.0.self_attn",
        "mask|causal",
    ),
]
