"""transformers' GPT-2 against this project's Flax twin; needs the extra "bench"."""

import numpy as np
import torch
from flax import nnx

import flax_gpt

SIZES = dict(vocab_size=61, context_length=29, embed_dim=15, num_layers=2, num_heads=3)


class Logits(torch.nn.Module):
    def __init__(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = dict(vocab_size=61, n_positions=29, n_embd=15, n_layer=2, n_head=3, n_inner=23)
        config = GPT2Config(**sizes, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


class FlaxNet(flax_gpt.GPT):
    def __call__(self, tokens):
        return super().__call__(tokens)[0]


def torch_net() -> torch.nn.Module:
    return Logits()


def flax_net() -> nnx.Module:
    return FlaxNet(flax_gpt.GPTConfig(**SIZES, mlp_dim=23))


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 61, size=(2, 9))
