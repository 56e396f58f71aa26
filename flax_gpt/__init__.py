"""A small GPT with an immutable KV cache. Its twin is torch_gpt; the two read side by side."""

from flax_gpt import random
from flax_gpt.cache import KVCache, LayerCache
from flax_gpt.config import PRESETS, Experts, GPTConfig, Layer, Rotary
from flax_gpt.decode import decode_step, prefill
from flax_gpt.decoding.batch_invariant import BatchInvariantCache, BatchInvariantDecoder
from flax_gpt.decoding.beams import Beams, beam_search
from flax_gpt.decoding.decoder import Decoder
from flax_gpt.decoding.files import load_cache, save_cache, weights_digest
from flax_gpt.decoding.generate import NO_TOKEN, Generation, generate, right_pad
from flax_gpt.decoding.kernels import KERNELS, Choice, Product
from flax_gpt.decoding.packing import PackedGPT, PackedLinear, choose_kernels, pack
from flax_gpt.decoding.sampling import GREEDY, Sampling, filter_logits
from flax_gpt.decoding.speculation import (
    DraftModel,
    PromptLookup,
    Speculation,
    rejection_rule,
    speculate,
)
from flax_gpt.metadata import AttentionMetadata
from flax_gpt.model import GPT, MLP, Attention, Block
from flax_gpt.training.classifier import SequenceClassifier, TokenClassifier
from flax_gpt.training.config import TrainConfig
from flax_gpt.training.loss import IGNORE_INDEX, TokenLoss, cross_entropy, next_token_loss
from flax_gpt.training.optimizer import adamw, learning_rate
from flax_gpt.training.step import (
    Evaluation,
    StepResult,
    TrainState,
    evaluate,
    overfit_one_batch,
    train_step,
)
from flax_gpt.training.tasks import NEXT_TOKEN, SEQUENCE_CLASS, TOKEN_CLASS, Batch, Task

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
