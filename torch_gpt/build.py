"""From a config to the parts of a model: the only file that branches on what a config says.

Read beside flax_gpt/build.py. A part that a model does not have is `identity`; the table of a kind
of positions that needs none is None, and no other kind reads it.
"""

from collections.abc import Callable

import torch
from torch import nn

from torch_gpt import layers
from torch_gpt.config import GPTConfig
from torch_gpt.layers import Activation, GatedActivation, embedding, identity, linear
from torch_gpt.positions import T5, Alibi, Learned, NoPositions, Rotary

Part = Callable[[torch.Tensor], torch.Tensor]

_NORMS = {
    "layer": layers.layer_norm,
    "rms": layers.rms_norm,
    "rms_plus_one": layers.rms_norm_plus_one,
}
_FUNCTIONS = {
    "gelu": layers.gelu,
    "gelu_tanh": layers.gelu_tanh,
    "gelu_bloom": layers.gelu_bloom,
    "silu": layers.silu,
}


def norm(config: GPTConfig, width: int | None = None) -> nn.LayerNorm | nn.RMSNorm:
    """Make the config's norm over the last axis, D wide or as given."""
    return _NORMS[config.norm](config, config.embed_dim if width is None else width)


def embedding_norm(config: GPTConfig) -> Part:
    """Make the norm of token embeddings."""
    return norm(config) if config.embedding_norm else identity


def head_norm(config: GPTConfig) -> Part:
    """Make the norm of queries or keys in each head."""
    return norm(config, config.head_width) if config.qk_norm else identity


def activation(config: GPTConfig) -> Activation:
    """Choose the nonlinear function of the MLP."""
    kind = GatedActivation if config.gated else Activation
    return kind(_FUNCTIONS[config.activation])


def gate(config: GPTConfig, key: torch.Tensor | None) -> Part:
    """Make the third map of a gated MLP."""
    if not config.gated:
        return identity
    return linear(config, config.embed_dim, config.mlp_dim, config.init_std, key, config.mlp_bias)


def head(config: GPTConfig, key: torch.Tensor | None) -> nn.Linear | None:
    """Make the map to logits; None where the token embedding is this map."""
    if config.tied_head:
        return None
    return linear(config, config.embed_dim, config.vocab_size, config.init_std, key, bias=False)


def windows(config: GPTConfig) -> tuple[int | None, ...]:
    """Return how many tokens a token sees in each block; None for all."""
    num_narrow = config.num_layers - config.num_full_layers
    return (None,) * config.num_full_layers + (config.window,) * num_narrow


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


def position_embedding(config: GPTConfig, key: torch.Tensor | None) -> nn.Embedding | None:
    """Make the table that `Learned` positions read."""
    if config.positions != "learned":
        return None
    return embedding(config, config.context_length, key)


def distance_embedding(config: GPTConfig, key: torch.Tensor | None) -> nn.Embedding | None:
    """Make the table that `T5` positions read."""
    if config.positions != "t5":
        return None
    return embedding(config, config.t5_buckets, key, config.num_heads)
