"""Read a prompt once and continue it four times.

    python examples/fork_a_prompt.py

Look at the last column: no continuation changes what another one writes, nor the prompt's own
cache, which has the same length at the end. In the second part a batch of four rows does the same
in one call per token, on a cache whose only row was selected four times.
"""

import dataclasses

import torch

from torch_gpt import GPT, GPTConfig, KVCache, decode_step, prefill, random

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
FIRST = [10, 20, 30, 40]  # the token that each continuation begins with
# Larger initial weights than usual, so that a model without training writes more than one token.
CONFIG = dataclasses.replace(GPTConfig.preset("tiny"), init_std=0.1)


@torch.no_grad()
def main() -> None:
    """Continue by turns, then in a batch."""
    model = GPT(CONFIG, random.key(1))
    _, prompt = prefill(model, PROMPT, KVCache.empty(model.config, batch_size=1, capacity=32))

    caches, tokens = [prompt] * 4, [torch.tensor([first]) for first in FIRST]
    texts: list[list[int]] = [[] for _ in FIRST]
    for _ in range(5):  # one token of each continuation in turn
        for i in range(4):
            logits, caches[i] = decode_step(model, tokens[i], caches[i])
            texts[i].append(int(tokens[i]))
            tokens[i] = logits.argmax(-1)
    for text, cache in zip(texts, caches, strict=True):
        print(f"continuation {text}  length {cache.lengths_B.item()}")
    print(f"the prompt's own cache: length {prompt.lengths_B.item()}")

    rows, token_B = prompt.select(torch.zeros(4, dtype=torch.long)), torch.tensor(FIRST)
    together = []
    for _ in range(5):
        together.append(token_B)
        logits, rows = decode_step(model, token_B, rows)
        token_B = logits.argmax(-1)
    print(f"the same as a batch of four rows: {torch.stack(together, 1).tolist() == texts}")


main()
