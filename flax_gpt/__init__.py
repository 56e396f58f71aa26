"""A small GPT with an immutable KV cache. Its twin is torch_gpt; the two read side by side."""

from flax_gpt import random
from flax_gpt.cache import KVCache, LayerCache
from flax_gpt.config import PRESETS, GPTConfig, TrainConfig
from flax_gpt.decode import NO_TOKEN, Generation, decode_step, generate, prefill, right_pad
from flax_gpt.loss import IGNORE_INDEX, TokenLoss, next_token_loss
from flax_gpt.model import GPT, MLP, Attention, Block
from flax_gpt.optimizer import adamw
from flax_gpt.train import TrainState, evaluate, train_step

__all__ = [
    "GPT",
    "IGNORE_INDEX",
    "MLP",
    "NO_TOKEN",
    "PRESETS",
    "Attention",
    "Block",
    "GPTConfig",
    "Generation",
    "KVCache",
    "LayerCache",
    "TokenLoss",
    "TrainConfig",
    "TrainState",
    "adamw",
    "decode_step",
    "evaluate",
    "generate",
    "next_token_loss",
    "prefill",
    "random",
    "right_pad",
    "train_step",
]
