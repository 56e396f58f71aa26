"""Time one token with and without a cache, in both frameworks, as the text grows.

    python examples/time_a_token.py

Look at how a row grows: without a cache a token costs the whole text again, with a cache hardly
more than before. `parity bench` measures this properly, on GPT-2, in turns, against peers.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

import flax_gpt
import torch_gpt

LENGTHS = 64, 255
SIZES = dict(vocab_size=128, context_length=256, embed_dim=128, num_heads=4, mlp_dim=512)


def milliseconds(call: Callable[[], object]) -> float:
    """Return the shortest of five runs, after one that compiles."""
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(1e3 * (time.perf_counter() - start))
    return min(taken[1:])


def row(gpt, ids, tokens_of) -> None:
    """Print what a token costs at each length."""
    model = gpt.GPT(gpt.GPTConfig(num_layers=2, **SIZES), gpt.random.key(0))
    decoder = gpt.Decoder(model, batch_size=1)
    cached, uncached = [], []
    for length in LENGTHS:
        text, token = tokens_of(length), ids([7])
        _, state = decoder.prefill(text)

        def step(token=token):
            nonlocal state
            _, longer = decoder.advance(token, state)
            state = longer.truncate(longer.lengths_B - 1)  # the next run appends to as many
            return longer.lengths_B

        cached.append(milliseconds(step))
        uncached.append(milliseconds(lambda text=text: decoder.prefill(text)[0]))
    for name, times in (("with a cache", cached), ("without", uncached)):
        print(f"{gpt.__name__:9} {name:12}", *(f"{x:8.2f} ms" for x in times))


print("text so far           ", *(f"{length:8} tok" for length in LENGTHS))
with torch.no_grad():
    row(torch_gpt, torch.tensor, lambda n: torch.arange(n)[None] % 128)
    row(flax_gpt, jnp.array, lambda n: jnp.arange(n)[None] % 128)
