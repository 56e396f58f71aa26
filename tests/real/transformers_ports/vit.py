"""ViT of transformers against a port with a patch convolution and fused queries, keys, values."""

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

D, N, F, P = 12, 3, 20, 4


def net():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=N,
            intermediate_size=F,
            image_size=8,
            patch_size=P,
            num_labels=5,
        )
    )


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(D, epsilon=1e-12, rngs=rngs) for _ in range(2))
        self.qkv, self.proj = nnx.Linear(D, 3 * D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)).reshape(b, t, 3, N, D // N), 2, 0)
        x = x + self.proj(jax.nn.dot_product_attention(q, k, v).reshape(b, t, D))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.patch = nnx.Conv(3, D, (P, P), strides=(P, P), padding="VALID", rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, D)))
        self.pos_embedding = nnx.Param(jax.random.normal(rngs.params(), (1, 5, D)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm, self.head = (
            nnx.LayerNorm(D, epsilon=1e-12, rngs=rngs),
            nnx.Linear(D, 5, rngs=rngs),
        )

    def __call__(self, images):
        x = self.patch(images.transpose(0, 2, 3, 1)).reshape(len(images), -1, D)
        x = jnp.concatenate([jnp.tile(self.cls_token[...], (len(images), 1, 1)), x], axis=1)
        x = x + self.pos_embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


port = Port


def torch_call(model, images):
    return model(pixel_values=images).logits


def make(rng):
    return rng.random((2, 3, 8, 8))


FAULTS = [
    ("GELU of jax", ", approximate=False", "", "vit.layers.0|vit.layers.0.mlp", "gelu"),
    (
        "positions before the token",
        "        x = x + self.pos_embedding[...]\n",
        "        x = x + jnp.roll(self.pos_embedding[...], -1, axis=1)\n",
        "ViTForImageClassification|vit.embeddings",
        "shifted by -1 along axis 1",
    ),
]
