"""From a config to the parts of a model: the only file that branches on what a config says.

Read beside torch_gpt/build.py. A part that a model does not have is `identity`; the table of a kind
of positions that needs none is None, and no other kind reads it.
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from flax_gpt import layers
from flax_gpt.config import GPTConfig
from flax_gpt.experts import ExpertsMLP, GatedShared, Router, Shared, SigmoidRouter
from flax_gpt.layers import (
    Activation,
    ClampedActivation,
    GatedActivation,
    Scale,
    SoftCap,
    embedding,
    identity,
    linear,
    split_or_none,
    without_shared,
)
from flax_gpt.metadata import AttentionMetadata
from flax_gpt.positions import T5, Alibi, Learned, NoPositions, Rotary
from flax_gpt.scores import CappedScores, Sinks

Part = Callable[[jax.Array], jax.Array]
MLPInput = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
SharedPart = Callable[[jax.Array, jax.Array], jax.Array]
MLPClass = Callable[[GPTConfig, jax.Array | None], nnx.Module]
Scores = Callable[[AttentionMetadata], AttentionMetadata]

_NORMS = {
    "layer": layers.layer_norm,
    "layer_no_bias": layers.layer_norm_no_bias,
    "rms": layers.rms_norm,
    "rms_plus_one": layers.rms_norm_plus_one,
}
_FUNCTIONS = {
    "gelu": layers.gelu,
    "gelu_tanh": layers.gelu_tanh,
    "gelu_bloom": layers.gelu_bloom,
    "silu": layers.silu,
    "relu": layers.relu,
    "relu_squared": layers.relu_squared,
}
_MLP_INPUTS = {
    "sequential": layers.attention_sum,
    "parallel": layers.block_input,
    "parallel_one_norm": layers.attention_input,
}


def norm(config: GPTConfig, width: int | None = None) -> nnx.LayerNorm | nnx.RMSNorm:
    """Make the config's norm over the last axis, D wide or as given."""
    return _NORMS[config.norm](config, config.embed_dim if width is None else width)


def embedding_norm(config: GPTConfig) -> Part:
    """Make the norm of token embeddings."""
    return norm(config) if config.embedding_norm else identity


def embedding_scale(config: GPTConfig) -> Part:
    """Make the factor of token embeddings."""
    return scale(config.embedding_scale)


def scale(factor: float) -> Part:
    """Make the product with a constant."""
    return identity if factor == 1.0 else Scale(factor)


def norm_before(config: GPTConfig, index: int = 1) -> Part:
    """Make the norm of what attention (index 1) or the MLP (2) reads."""
    shared = index == 2 and config.residual == "parallel_one_norm"
    return identity if config.norm_place == "after" or shared else norm(config)


def after(config: GPTConfig) -> Part:
    """Make what an output of attention or MLP goes through before it is added: norm or factor."""
    return scale(config.residual_scale) if config.norm_place == "before" else norm(config)


def mlp_input(config: GPTConfig) -> MLPInput:
    """Choose what the MLP of a block reads."""
    return _MLP_INPUTS[config.residual]


def head_norm(config: GPTConfig, num_heads: int) -> Part:
    """Make the norm of queries or keys."""
    if config.qk_norm == "none":
        return identity
    if config.qk_norm == "head":
        return norm(config, config.head_width)
    return layers.norm_of_heads(config, num_heads * config.head_width)


def query_scale(config: GPTConfig) -> Part:
    """Make the factor of queries, by which scores are another than products over the root of H."""
    wanted = config.attention_scale
    return scale(1.0 if wanted is None else wanted * config.head_width**0.5)


def scores(config: GPTConfig) -> Scores:
    """Choose what else the scores of a block go through."""
    if config.sinks:
        return Sinks(config)
    return identity if config.score_cap is None else CappedScores(config.score_cap)


def logits(config: GPTConfig) -> Part:
    """Make what logits go through."""
    cap = config.logit_cap
    return scale(config.logit_scale) if cap is None else SoftCap(cap)


def activation(config: GPTConfig) -> Activation:
    """Choose the nonlinear function of the MLP."""
    if config.activation == "silu_clamped":
        return ClampedActivation(identity)
    kind = GatedActivation if config.gated else Activation
    return kind(_FUNCTIONS[config.activation])


def gate(config: GPTConfig, key: jax.Array | None) -> Part:
    """Make the third map of a gated MLP."""
    if not config.gated:
        return identity
    return linear(config, config.embed_dim, config.mlp_dim, config.init_std, key, config.mlp_bias)


def mlp(config: GPTConfig, key: jax.Array | None, dense: MLPClass) -> nnx.Module:
    """Make the MLP of a block: one, or experts; `dense` is the class of the first."""
    if config.experts is None:
        return dense(config, key)
    subkeys = split_or_none(key, 2)
    router = SigmoidRouter if config.experts.router == "sigmoid" else Router
    parts = router, activation(config), shared(config, subkeys[1], dense)
    return ExpertsMLP(config, subkeys[0], *parts)


def shared(config: GPTConfig, key: jax.Array | None, dense: MLPClass) -> SharedPart:
    """Make the MLP that every token takes besides its experts."""
    assert config.experts is not None
    width = config.experts.shared_width
    if width is None:
        return without_shared
    subkeys = split_or_none(key, 2)
    mlp = dense(dataclasses.replace(config, experts=None, mlp_dim=width), subkeys[0])
    return GatedShared(mlp, config, subkeys[1]) if config.experts.shared_gate else Shared(mlp)


def head(config: GPTConfig, key: jax.Array | None) -> nnx.Linear | None:
    """Make the map to logits; None where the token embedding is this map."""
    if config.tied_head:
        return None
    return linear(config, config.embed_dim, config.vocab_size, config.init_std, key, bias=False)


def kinds(config: GPTConfig) -> tuple[tuple[NoPositions, int | None], ...]:
    """Return each block's positions, and how many tokens a token sees there; None for all."""
    return tuple((positions(block), block.window) for block in config.blocks)


def positions(config: GPTConfig) -> NoPositions:
    """Choose how the model knows where its tokens stand."""
    if config.positions == "learned":
        return Learned()
    if config.positions == "rotary":
        length = config.rotary.original_length or config.context_length
        return Rotary(config.rotary, config.rotary_dim // 2, length, config.dtype)
    if config.positions == "alibi":
        return Alibi(config.num_heads, config.kv_heads, config.dtype)
    if config.positions == "t5":
        return T5(config.t5_buckets, config.t5_max_distance, config.kv_heads)
    return NoPositions()


def position_embedding(config: GPTConfig, key: jax.Array | None) -> nnx.Embed | None:
    """Make the table that `Learned` positions read."""
    if config.positions != "learned":
        return None
    return embedding(config, config.context_length, key)


def distance_embedding(config: GPTConfig, key: jax.Array | None) -> nnx.Embed | None:
    """Make the table that `T5` positions read."""
    if config.positions != "t5":
        return None
    return embedding(config, config.t5_buckets, key, config.num_heads)
