"""Greedy text: without a cache, complete; with one, for part 2.

Dimension key: B batch, T tokens given, G tokens with those chosen, V vocabulary.
"""

import torch

from model import GPT


@torch.no_grad()
def generate(model: GPT, tokens_BT: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Continue each row with the most likely token, again and again.

    Reads everything again for each new token: the last `context_length` tokens, or all if they are
    fewer.

    Args:
        model: scores the next token.
        tokens_BT: what is continued, one token at least.
        num_tokens: how many to add.

    Returns:
        The given tokens and the chosen ones after them (B, T + num_tokens).
    """
    tokens_BG = tokens_BT
    for _ in range(num_tokens):
        window_BT = tokens_BG[:, -model.config.context_length :]
        logits_BTV = model(window_BT)
        chosen_B1 = logits_BTV[:, -1].argmax(dim=-1, keepdim=True)
        tokens_BG = torch.cat([tokens_BG, chosen_B1], dim=1)
    return tokens_BG


def generate_cached(model: GPT, tokens_BT: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Generate the tokens of `generate`, reading each token only once.

    The given tokens are read in one call with an empty `KVCache`; each chosen token is then read
    alone, with the cache of everything before it.

    Args:
        model: scores the next token; called as `logits, cache = model(tokens, cache)`.
        tokens_BT: what is continued, one token at least.
        num_tokens: how many to add; T + num_tokens is never more than context_length here.

    Returns:
        The given tokens and the chosen ones after them (B, T + num_tokens).
    """
    raise NotImplementedError("part 2")
