"""Thread a KV cache through a model, in PyTorch and in Flax.

    python examples/thread_a_cache.py

Look at the lengths: the cache that goes in keeps its own, and the one that comes out is longer by
the tokens of the call. The tokens are those that the model would write without a cache, and the
same in both frameworks, because one seed gives both the same weights.
"""

from types import ModuleType

import jax.numpy as jnp
import torch

import flax_gpt
import torch_gpt

PROMPT = [3, 1, 4, 1, 5]
# Larger initial weights than usual, so that a model without training writes more than one token.
SIZES = dict(vocab_size=128, context_length=32, embed_dim=48, num_layers=2, num_heads=4, mlp_dim=96)


def write(gpt: ModuleType, model, array) -> list[int]:
    """Continue the prompt by six tokens and print how the cache grows."""
    print(gpt.__name__)
    empty = gpt.KVCache.empty(model.config, batch_size=1, capacity=16)
    logits, cache = gpt.prefill(model, array([PROMPT]), empty)
    print(f"  prefill      length {length(empty)} -> {length(cache)}")
    written = []
    for _ in range(6):
        token = int(logits.argmax(-1)[0])
        written.append(token)
        logits, longer = gpt.decode_step(model, array([token]), cache)
        print(f"  token {token:3d}    length {length(cache)} -> {length(longer)}")
        cache = longer
    return written


def length(cache) -> int:
    """Return the number of tokens that the first row holds."""
    return cache.lengths_B.tolist()[0]


torch_model, flax_model = (
    gpt.GPT(gpt.GPTConfig(**SIZES, init_std=0.3), gpt.random.key(0))
    for gpt in (torch_gpt, flax_gpt)
)
text = write(torch_gpt, torch_model, torch.tensor)
whole, _ = torch_model(torch.tensor([PROMPT + text]))
uncached = whole[0].argmax(-1).tolist()[len(PROMPT) - 1 : -1]
print(f"the same without a cache: {uncached == text}")
print(f"the same in Flax: {write(flax_gpt, flax_model, jnp.array) == text}")
