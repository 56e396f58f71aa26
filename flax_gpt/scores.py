"""What scores go through besides a mask: a bound, or sinks. Read beside torch_gpt/scores.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, N query
heads.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt.config import GPTConfig
from flax_gpt.layers import parameter_dtype
from flax_gpt.metadata import AttentionMetadata


@dataclasses.dataclass(frozen=True)
class CappedScores:
    """Scores that are bent so that none reaches a cap. Gemma team, "Gemma 2", 2024.

    Attributes:
        cap: see `layers.SoftCap`.
    """

    cap: float

    def __call__(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Add the cap to what a block knows of a call."""
        return dataclasses.replace(metadata, score_cap=self.cap)


class Sinks(nnx.Module):
    """A learned score for each query head, to which a token can look instead of to tokens.

    Xiao et al., "Efficient streaming language models with attention sinks", 2024.
    """

    def __init__(self, config: GPTConfig):
        self.num_kv_heads = config.kv_heads
        self.weight = nnx.Param(jnp.zeros(config.num_heads, parameter_dtype(config)))

    def __call__(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Add the sinks to what a block knows of a call."""
        sinks_KQ = self.weight[...].reshape(self.num_kv_heads, -1)
        return dataclasses.replace(metadata, sinks_KQ=sinks_KQ)


def softmax_with_sinks(scores_BKQTS: jax.Array, sinks_KQ: jax.Array) -> jax.Array:
    """Compute the softmax over the columns and one sink, without the sink's weight."""
    sinks_1KQ11 = sinks_KQ[None, :, :, None, None].astype(scores_BKQTS.dtype)
    sinks_BKQT1 = jnp.broadcast_to(sinks_1KQ11, (*scores_BKQTS.shape[:-1], 1))
    joined = jnp.concatenate([scores_BKQTS, sinks_BKQT1], axis=-1)
    return jax.nn.softmax(joined, axis=-1)[..., :-1]
