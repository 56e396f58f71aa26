"""The GPT with another head: a class for every token, or one for the sequence.

Read beside torch_gpt/training/classifier.py.

Dimension key: B batch, T tokens, D embed dim, C classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt.config import GPTConfig
from flax_gpt.layers import linear, split_or_none
from flax_gpt.model import GPT


class TokenClassifier(nnx.Module):
    """A model that names a class for every token, from it and what stands before it.

    Args:
        config: of the GPT below the head.
        num_classes: C.
        key: draws the initial weights; None leaves zeros.
    """

    def __init__(self, config: GPTConfig, num_classes: int, key: jax.Array | None = None):
        subkeys = split_or_none(key, 2)
        self.gpt = GPT(config, subkeys[0])
        self.head = linear(config, config.embed_dim, num_classes, config.init_std, subkeys[1])

    def __call__(
        self,
        tokens_BT: jax.Array,
        counts_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Score the classes, (B, T, C); scores of padding mean nothing."""
        x_BTD, _ = self.gpt.hidden(tokens_BT, None, counts_B, key)
        return self.head(x_BTD)


class SequenceClassifier(TokenClassifier):
    """A model that names one class per sequence, by the mean over its real tokens."""

    def __call__(
        self,
        tokens_BT: jax.Array,
        counts_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Score the classes, (B, C)."""
        x_BTD, _ = self.gpt.hidden(tokens_BT, None, counts_B, key)
        return self.head(mean_over_tokens(x_BTD, counts_B))


def mean_over_tokens(x_BTD: jax.Array, counts_B: jax.Array | None = None) -> jax.Array:
    """Average over each row's real tokens, (B, D); zeros for a row that has none."""
    wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    if counts_B is None:
        return jnp.mean(wide_BTD, axis=1).astype(x_BTD.dtype)
    real_BT = jnp.arange(x_BTD.shape[1])[None, :] < counts_B[:, None]
    total_BD = jnp.sum(jnp.where(real_BT[:, :, None], wide_BTD, 0.0), axis=1)
    counts_B1 = jnp.maximum(counts_B, 1)[:, None].astype(wide_BTD.dtype)
    return (total_BD / counts_B1).astype(x_BTD.dtype)
