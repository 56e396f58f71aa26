"""A small GPT with an immutable KV cache. Its twin is flax_gpt; the two read side by side."""

from torch_gpt import random
from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.classifier import SequenceClassifier, TokenClassifier
from torch_gpt.config import GREEDY, PRESETS, GPTConfig, Rotary, Sampling, TrainConfig
from torch_gpt.decode import decode_step, prefill
from torch_gpt.decoder import Decoder
from torch_gpt.generation import NO_TOKEN, Generation, filter_logits, generate, right_pad
from torch_gpt.loss import IGNORE_INDEX, TokenLoss, cross_entropy, next_token_loss
from torch_gpt.model import GPT, MLP, Attention, Block
from torch_gpt.optimizer import adamw, learning_rate
from torch_gpt.packing import PackedGPT, PackedLinear, pack
from torch_gpt.tasks import NEXT_TOKEN, SEQUENCE_CLASS, TOKEN_CLASS, Batch, Task
from torch_gpt.train import (
    Evaluation,
    StepResult,
    TrainState,
    evaluate,
    overfit_one_batch,
    train_step,
)

__all__ = [
    "GPT",
    "GREEDY",
    "IGNORE_INDEX",
    "MLP",
    "NEXT_TOKEN",
    "NO_TOKEN",
    "PRESETS",
    "SEQUENCE_CLASS",
    "TOKEN_CLASS",
    "Attention",
    "Batch",
    "Block",
    "Decoder",
    "Evaluation",
    "GPTConfig",
    "Generation",
    "KVCache",
    "LayerCache",
    "PackedGPT",
    "PackedLinear",
    "Rotary",
    "Sampling",
    "SequenceClassifier",
    "StepResult",
    "Task",
    "TokenClassifier",
    "TokenLoss",
    "TrainConfig",
    "TrainState",
    "adamw",
    "cross_entropy",
    "decode_step",
    "evaluate",
    "filter_logits",
    "generate",
    "learning_rate",
    "next_token_loss",
    "overfit_one_batch",
    "pack",
    "prefill",
    "random",
    "right_pad",
    "train_step",
]
