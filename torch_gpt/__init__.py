"""A small GPT with an immutable KV cache. Its twin is flax_gpt; the two read side by side."""

from torch_gpt import random
from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.config import PRESETS, GPTConfig, TrainConfig
from torch_gpt.decode import NO_TOKEN, Generation, decode_step, generate, prefill, right_pad
from torch_gpt.loss import IGNORE_INDEX, TokenLoss, next_token_loss
from torch_gpt.model import GPT, MLP, Attention, Block
from torch_gpt.optimizer import adamw
from torch_gpt.train import TrainState, evaluate, train_step

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
