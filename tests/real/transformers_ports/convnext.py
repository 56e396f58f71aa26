"""ConvNeXt of transformers against a port with 1x1 convolutions in the blocks."""

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

WIDTHS, DEPTHS = (6, 8), (1, 2)


def net():
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(
            hidden_sizes=list(WIDTHS),
            depths=list(DEPTHS),
            num_stages=2,
            patch_size=2,
            num_labels=5,
        )
    )


def norm(size, rngs):
    return nnx.LayerNorm(size, epsilon=1e-6, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, dim, rngs):
        self.dwconv = nnx.Conv(dim, dim, (7, 7), padding=3, feature_group_count=dim, rngs=rngs)
        self.norm = norm(dim, rngs)
        self.pw1 = nnx.Conv(dim, 4 * dim, (1, 1), rngs=rngs)
        self.pw2 = nnx.Conv(4 * dim, dim, (1, 1), rngs=rngs)
        self.gamma = nnx.Param(jnp.full((dim,), 1e-6))

    def __call__(self, x):
        y = jax.nn.gelu(self.pw1(self.norm(self.dwconv(x))), approximate=False)
        return x + self.gamma[...] * self.pw2(y)


class Stage(nnx.Module):
    def __init__(self, before, dim, depth, patch, rngs):
        convolution = dict(strides=patch, padding="VALID", rngs=rngs)
        self.conv = nnx.Conv(before, dim, (patch, patch), **convolution)
        self.first = before == 3
        self.norm = norm(dim if self.first else before, rngs)
        self.blocks = nnx.List([Block(dim, rngs) for _ in range(depth)])

    def __call__(self, x):
        x = self.norm(self.conv(x)) if self.first else self.conv(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        sizes = zip((3, *WIDTHS), WIDTHS, DEPTHS, strict=False)
        self.stages = nnx.List([Stage(i, o, depth, 2, rngs) for i, o, depth in sizes])
        self.norm = nnx.LayerNorm(WIDTHS[-1], epsilon=1e-12, rngs=rngs)
        self.classifier = nnx.Linear(WIDTHS[-1], 5, rngs=rngs)

    def __call__(self, pixel_values):
        x = pixel_values.transpose(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return {"logits": self.classifier(self.norm(x.mean(axis=(1, 2))))}


port = Port


def make(rng):
    return {"pixel_values": rng.normal(size=(2, 3, 8, 8))}


FAULTS = [
    ("GELU of jax", ", approximate=False", "", "convnext.encoder.stages.0.layers.0", "gelu"),
    ("last epsilon 1e-5", "epsilon=1e-12", "epsilon=1e-5", "norm|convnext.layernorm", "1e-05"),
    (
        "sum over the picture",
        "x.mean(axis=(1, 2))",
        "x.sum(axis=(1, 2))",
        "ConvNextForImageClassification|convnext|norm",
        "sum",
    ),
]
