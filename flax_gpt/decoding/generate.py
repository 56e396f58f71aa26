"""Generation: tokens chosen from logits, one after the other.

Read beside torch_gpt/decoding/generate.py.

Dimension key: B batch, T prompt tokens, S sequence slots, G generated tokens, V vocab.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_gpt import random
from flax_gpt.cache import KVCache
from flax_gpt.config import GPTConfig
from flax_gpt.decoding.decoder import Decoder, Steps, capacity_for
from flax_gpt.decoding.sampling import GREEDY, Sampling, filter_logits, widened
from flax_gpt.model import GPT

NO_TOKEN = -1  # fills a generated row after its stop
_WORTH_PACKING = 128  # new tokens; laying weights out takes as long as it saves in these


@dataclasses.dataclass(frozen=True)
class Generation:
    """Tokens that `generate` wrote.

    Attributes:
        tokens_BG: the new tokens; NO_TOKEN after a row's stop.
        counts_B: new tokens per row, the stop among them.
        margins_BG: by how much a token's score beat the second best, which tells near-ties. Scores
            are logits, and where tokens are drawn what `filter_logits` gives, with noise; inf for a
            token that was the only one left, NaN after a row's stop.
    """

    tokens_BG: jax.Array
    counts_B: jax.Array
    margins_BG: jax.Array


def generate(
    model: GPT | Decoder,
    tokens_BT: ArrayLike,
    max_new_tokens: int,
    counts_B: ArrayLike | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
) -> Generation:
    """Continue each prompt with the most likely token, or with one drawn from the likely.

    Ties go to the lowest id in both twins, which is what makes equal tokens a fair demand. A row
    ends after its first stop id; the call ends when every row has, or after `max_new_tokens`.

    The noise in a draw comes from the key, the row and the number of the token in this call. Other
    rows, padding, the cache and the dtype of the model do not change it.

    Args:
        model: or a Decoder, which serves many calls; with a `BatchInvariantDecoder` every number is
            the same to the last bit with and without the cache.
        tokens_BT: prompts, padded on the right; `right_pad` converts padding on the left.
        max_new_tokens: G.
        counts_B: real tokens per prompt; None for T.
        stop_ids: ids that end a row; a stop is part of the row's output.
        use_cache: False computes every token from the whole sequence, as the reference.
        sampling: how a token is chosen from its logits; the most likely one when not given.
        key: draws the tokens, so each call needs its own; None when nothing is drawn.

    Returns:
        The new tokens, how many they are, and by how much each was chosen.

    Raises:
        ValueError: on empty prompts, ids outside the vocabulary, more tokens than the context
            holds, or nothing to draw from.
    """
    counts_B = check_prompts(model.config, tokens_BT, counts_B, max_new_tokens, sampling, key)
    if sampling.temperature == 0.0:
        sampling, key = GREEDY, None  # the filters keep the first token, whatever they are
    tokens_BT = np.asarray(tokens_BT)[:, : model.config.context_length]  # beyond is padding
    batch_size, num_tokens = tokens_BT.shape
    packed = max_new_tokens >= _WORTH_PACKING
    decoder = model if isinstance(model, Decoder) else Decoder(model, batch_size, packed)
    # twin: jax compiles the whole loop, once for all that need as much room; torch takes one step
    # after the other.
    # The last token is chosen and not appended.
    capacity = capacity_for(int(counts_B.max()) + max_new_tokens - 1, model.config)
    if use_cache:
        logits_BV, state = decoder.prefill(tokens_BT, counts_B, capacity)
    else:
        sequences_BS = np.zeros((batch_size, capacity), np.int32)
        sequences_BS[:, :num_tokens] = tokens_BT[:, :capacity]
        state = jnp.asarray(sequences_BS), jnp.asarray(counts_B, jnp.int32)
        logits_BV = decoder.run(_score, state, static=(decoder.steps,))
    # Rounded up as well: no row ever chooses NO_TOKEN.
    stops = np.asarray(stop_ids, np.int32).reshape(-1)
    stops = np.pad(stops, (0, -len(stops) % 4), constant_values=NO_TOKEN)
    operands = logits_BV, stops, key, np.int32(max_new_tokens)
    static = sampling, decoder.steps
    tokens_BS, margins_BS, _ = decoder.run(_loop, *operands, state=state, static=static)
    tokens_BG, margins_BG = tokens_BS[:, :max_new_tokens], margins_BS[:, :max_new_tokens]
    return Generation(
        tokens_BG, jnp.sum(tokens_BG != NO_TOKEN, axis=1, dtype=jnp.int32), margins_BG
    )


def right_pad(tokens_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convert left-padded batches, as Hugging Face tokenizers make them, to right-padded ones.

    Args:
        tokens_BT: rows padded on either side.
        mask_BT: 1 for real tokens, 0 for padding.

    Returns:
        tokens_BT with each row's real tokens first, and counts_B.

    Raises:
        ValueError: when padding lies between real tokens.
    """
    real_BT = np.asarray(mask_BT).astype(bool)
    starts_BT = real_BT & ~np.pad(real_BT, ((0, 0), (1, 0)))[:, :-1]
    for row in np.flatnonzero(starts_BT.sum(axis=1) > 1)[:1]:
        raise ValueError(
            f"right_pad: row {row} has padding between its tokens. A row is one run of tokens. Pad "
            "on one side or both."
        )
    order_BT = np.argsort(~real_BT, axis=1, kind="stable")
    tokens_BT = jnp.take_along_axis(jnp.asarray(tokens_BT), jnp.asarray(order_BT), axis=1)
    return tokens_BT, jnp.asarray(real_BT.sum(axis=1), jnp.int32)


def _score(model: GPT, state: tuple[jax.Array, jax.Array], steps: Steps) -> jax.Array:
    """Score the next token of sequences of some lengths, from nothing but the tokens."""
    return steps.score_uncached(model, *state)


def _loop(
    model: GPT,
    logits_BV: jax.Array,
    stop_ids: jax.Array,
    key: jax.Array | None,
    max_new_tokens: jax.Array,
    state: KVCache | tuple[jax.Array, jax.Array],
    sampling: Sampling,
    steps: Steps,
) -> tuple[jax.Array, jax.Array, KVCache | tuple[jax.Array, jax.Array]]:
    """Run all of `generate` after the prompts, on the device.

    Args:
        model: continues the prompts.
        logits_BV: after the prompts.
        stop_ids: ids that end a row.
        key: draws the tokens; None when nothing is drawn.
        max_new_tokens: after which every row ends.
        state: the cache, or the sequences and their lengths.
        sampling: how a token is chosen.
        steps: what runs.

    Returns:
        Tokens and margins, and the state at the end, which has the memory of the one given.
    """
    cached = not isinstance(state, tuple)
    num_slots = state.capacity if cached else state[0].shape[1]
    B = logits_BV.shape[0]
    rows_B = jnp.arange(B)

    def extend(tokens_B, state):
        """Append one token per row and score the next."""
        if cached:
            return steps.decode_step(model, tokens_B, state)
        sequences_BS, lengths_B = state
        state = sequences_BS.at[rows_B, lengths_B].set(tokens_B), lengths_B + 1
        return _score(model, state, steps), state

    def choose(step, logits_BV, ended_B, tokens_BS, margins_BS):
        """Choose the next token of each row, write it down, and note which rows have ended."""
        scores_BV = widened(logits_BV)
        if key is not None:
            left_BV = filter_logits(logits_BV, sampling)
            scores_BV = random.perturb(random.fold_in(key, step), left_BV)
        tokens_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
        chosen_BV = tokens_B[:, None] == jnp.arange(scores_BV.shape[1])[None, :]
        second_B = jnp.max(jnp.where(chosen_BV, -jnp.inf, scores_BV), axis=-1)
        margins_B = jnp.max(scores_BV, axis=-1) - second_B
        tokens_BS = tokens_BS.at[:, step].set(jnp.where(ended_B, NO_TOKEN, tokens_B))
        margins_BS = margins_BS.at[:, step].set(jnp.where(ended_B, jnp.nan, margins_B))
        stops_B = jnp.any(tokens_B[:, None] == stop_ids[None, :], axis=1)
        return tokens_B, ended_B | stops_B, tokens_BS, margins_BS

    def unfinished(carry):
        step, _, _, ended_B, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(ended_B)

    def body(carry):
        step, state, tokens_B, *written = carry
        logits_BV, state = extend(tokens_B, state)
        return step + 1, state, *choose(step, logits_BV, *written)

    tokens_BS = jnp.full((B, num_slots), NO_TOKEN, jnp.int32)
    margins_BS = jnp.full((B, num_slots), jnp.nan, widened(logits_BV).dtype)
    first = choose(0, logits_BV, jnp.zeros(B, bool), tokens_BS, margins_BS)
    carry = jax.lax.while_loop(unfinished, body, (jnp.int32(1), state, *first))
    _, state, _, _, tokens_BS, margins_BS = carry
    return tokens_BS, margins_BS, state


def check_prompts(
    config: GPTConfig,
    tokens_BT: ArrayLike,
    counts_B: ArrayLike | None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    who: str = "generate",
) -> np.ndarray:
    """Return counts_B on the host, or refuse the request with all that is wrong with it.

    Raises:
        ValueError: with the name of the function that was asked, `who`.
    """
    tokens_BT = np.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or 0 in tokens_BT.shape:
        raise ValueError(
            f"{who}: prompts of shape {tokens_BT.shape}. A prompt is at least one token, and a "
            "batch is (B, T). Give every row a token."
        )
    B, T = tokens_BT.shape
    counts_B = np.full(B, T) if counts_B is None else np.asarray(counts_B)
    problems = []
    if max_new_tokens < 1:
        problems.append(f"{max_new_tokens} new tokens are fewer than 1")
    if counts_B.shape != (B,) or np.any(counts_B < 1) or np.any(counts_B > T):
        problems.append(f"counts {counts_B.tolist()} are not {B} numbers from 1 to {T}")
    else:
        ids = tokens_BT[np.arange(T)[None, :] < counts_B[:, None]]
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            problems.append(
                f"ids {ids.min()} to {ids.max()} are not all in [0, {config.vocab_size})"
            )
        room = config.context_length - int(counts_B.max())
        if max_new_tokens > room:
            problems.append(
                f"{counts_B.max()} prompt tokens + {max_new_tokens} new tokens = "
                f"{counts_B.max() + max_new_tokens} > context_length "
                f"{config.context_length}; ask for at most {max(room, 0)}"
            )
    if sampling.temperature > 0.0 and key is None:
        problems.append(
            f"temperature {sampling.temperature} and no key to draw with; give one or take "
            "temperature 0"
        )
    if problems:
        raise ValueError(f"{who}: {'; '.join(problems)}.")
    return counts_B
