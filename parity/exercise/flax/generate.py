"""Greedy text: without a cache, complete; with one, for part 2.

Dimension key: B batch, T tokens given, G tokens with those chosen, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import GPT


@nnx.jit
def score(model: GPT, tokens_BT: jax.Array) -> jax.Array:
    """Return logits (B, T, V), compiled once for each shape."""
    return model(tokens_BT)


def generate(model: GPT, tokens_BT: jax.Array, num_tokens: int) -> jax.Array:
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
    context_length = model.config.context_length
    tokens_BG = np.asarray(tokens_BT)
    for _ in range(num_tokens):
        window_BT = tokens_BG[:, -context_length:]
        # Always the same shape, so that there is one program: no token sees the padding after it.
        padding = context_length - window_BT.shape[1]
        padded_BT = np.pad(window_BT, ((0, 0), (0, padding)))
        logits_BTV = score(model, padded_BT)
        chosen_B1 = logits_BTV[:, window_BT.shape[1] - 1].argmax(axis=-1, keepdims=True)
        tokens_BG = np.concatenate([tokens_BG, chosen_B1], axis=1)
    return jnp.asarray(tokens_BG)


def generate_cached(model: GPT, tokens_BT: jax.Array, num_tokens: int) -> jax.Array:
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
