"""A checkpoint as a pair for the check: both twins with its sizes and its weights."""

import dataclasses

from flax_gpt import GPTConfig
from parity.checkpoints.tokens import Tokens
from parity.checkpoints.weights import Weights
from parity.pair.pair import Pair
from parity.pair.text import Corpus, decode
from parity.twins.pair import twins

# The check reads sequences as long as the context, and scores grow with the square.
_LONGEST = 1024
_TEXT = 200_000  # characters that are enough for every batch
_NEW_TOKENS = 256


def pair_of(
    weights: Weights,
    corpus: Corpus,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> Pair:
    """Return both twins with the weights of a checkpoint, in float32, and probes cut from a text.

    Args:
        weights: of the checkpoint.
        corpus: a text, read by the checkpoint's tokenizer; without one, tokens are drawn by chance.
        dropout: in training.
        seed: of passages and dropout.
        max_new_tokens: after each prompt; None for 256, or half of the context.

    Raises:
        ValueError: for numbers that are not finite, or too many new tokens.
    """
    config = _readable(dataclasses.replace(weights.config, dtype="float32", dropout=dropout))
    text = decode(corpus.vocabulary, corpus.ids[:_TEXT])
    tokens = Tokens(weights.path, config.vocab_size)
    ids = tokens.of_text(text, seed)
    source = f"{corpus.source} by tokenizer.json" if tokens.reads_text else "random ids"
    new = max_new_tokens or min(_NEW_TOKENS, config.context_length // 2)
    leaves = dict(weights.leaves("float32"))
    passages = Corpus.from_ids(ids, source)
    pair = twins(passages, config, seed=seed, max_new_tokens=new, leaves=leaves)
    about = {"checkpoint": str(weights.path), "family": weights.family}
    return dataclasses.replace(pair, config=dict(pair.config) | about)


def _readable(config: GPTConfig) -> GPTConfig:
    """Return a config whose context the check can read; its angles are those of the whole one."""
    if config.positions == "learned" or config.context_length <= _LONGEST:
        return config
    rotary = config.rotary
    if rotary.original_length is None:
        rotary = dataclasses.replace(rotary, original_length=config.context_length)
    return dataclasses.replace(config, context_length=_LONGEST, rotary=rotary)
