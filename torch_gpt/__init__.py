"""A small GPT with an immutable KV cache. Its twin is flax_gpt; the two read side by side."""

from torch_gpt import random
from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.config import PRESETS, Experts, GPTConfig, Layer, Rotary
from torch_gpt.decode import decode_step, prefill
from torch_gpt.decoding.batch_invariant import BatchInvariantCache, BatchInvariantDecoder
from torch_gpt.decoding.beams import Beams, beam_search
from torch_gpt.decoding.decoder import Decoder
from torch_gpt.decoding.files import load_cache, save_cache, weights_digest
from torch_gpt.decoding.generate import NO_TOKEN, Generation, generate, right_pad
from torch_gpt.decoding.kernels import KERNELS, Choice, Product
from torch_gpt.decoding.packing import PackedGPT, PackedLinear, choose_kernels, pack
from torch_gpt.decoding.sampling import GREEDY, Sampling, filter_logits
from torch_gpt.decoding.speculation import (
    DraftModel,
    PromptLookup,
    Speculation,
    rejection_rule,
    speculate,
)
from torch_gpt.metadata import AttentionMetadata
from torch_gpt.model import GPT, MLP, Attention, Block
from torch_gpt.training.classifier import SequenceClassifier, TokenClassifier
from torch_gpt.training.config import TrainConfig
from torch_gpt.training.loss import IGNORE_INDEX, TokenLoss, cross_entropy, next_token_loss
from torch_gpt.training.optimizer import adamw, learning_rate
from torch_gpt.training.step import (
    Evaluation,
    StepResult,
    TrainState,
    evaluate,
    overfit_one_batch,
    train_step,
)
from torch_gpt.training.tasks import NEXT_TOKEN, SEQUENCE_CLASS, TOKEN_CLASS, Batch, Task

__all__ = [
    "GPT",
    "GREEDY",
    "IGNORE_INDEX",
    "KERNELS",
    "MLP",
    "NEXT_TOKEN",
    "NO_TOKEN",
    "PRESETS",
    "SEQUENCE_CLASS",
    "TOKEN_CLASS",
    "Attention",
    "AttentionMetadata",
    "Batch",
    "BatchInvariantCache",
    "BatchInvariantDecoder",
    "Beams",
    "Block",
    "Choice",
    "Decoder",
    "DraftModel",
    "Evaluation",
    "Experts",
    "GPTConfig",
    "Generation",
    "KVCache",
    "Layer",
    "LayerCache",
    "PackedGPT",
    "PackedLinear",
    "Product",
    "PromptLookup",
    "Rotary",
    "Sampling",
    "SequenceClassifier",
    "Speculation",
    "StepResult",
    "Task",
    "TokenClassifier",
    "TokenLoss",
    "TrainConfig",
    "TrainState",
    "adamw",
    "beam_search",
    "choose_kernels",
    "cross_entropy",
    "decode_step",
    "evaluate",
    "filter_logits",
    "generate",
    "learning_rate",
    "load_cache",
    "next_token_loss",
    "overfit_one_batch",
    "pack",
    "prefill",
    "random",
    "rejection_rule",
    "right_pad",
    "save_cache",
    "speculate",
    "train_step",
    "weights_digest",
]
