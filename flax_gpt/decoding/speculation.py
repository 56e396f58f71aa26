"""Speculation: several tokens guessed, scored in one call, and kept as far as they are right.

Read beside torch_gpt/decoding/speculation.py.

The guesses come from a smaller model or from the text itself. A cache that holds them is cut back
to those that are kept, which is why it costs nothing to be wrong but the call. Greedy tokens are
those of `generate`; drawn ones have the same distribution, by the rule of Leviathan et al., "Fast
inference from transformers via speculative decoding", 2023.

Dimension key: B batch, T tokens of one call, S tokens of a text, G generated tokens, P guesses,
V vocab.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_gpt import random
from flax_gpt.cache import KVCache
from flax_gpt.decoding import batch_invariant
from flax_gpt.decoding.batch_invariant import BatchInvariantCache
from flax_gpt.decoding.decoder import Decoder, capacity_for
from flax_gpt.decoding.generate import NO_TOKEN, check_prompts
from flax_gpt.decoding.sampling import GREEDY, Sampling, filter_logits, widened
from flax_gpt.model import GPT

Cache = KVCache | BatchInvariantCache


@dataclasses.dataclass(frozen=True)
class Guesses:
    """What may come next.

    Attributes:
        tokens_BP: guessed ids, from the left.
        counts_B: guesses of each row; the rest is padding.
        probabilities_BPV: from which each was drawn; None where it was certain.
    """

    tokens_BP: np.ndarray
    counts_B: np.ndarray
    probabilities_BPV: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Guesses by the text itself: what came after its last tokens when they stood there before.

    Attributes:
        num_tokens: P, guesses of a call.
        longest: tokens of the ending that is looked for; shorter ones where it is not found.
    """

    num_tokens: int = 5
    longest: int = 3

    def start(self, tokens_BT: np.ndarray, counts_B: np.ndarray, capacity: int) -> None:
        """Keep nothing: the text is all it needs."""

    def guess(
        self, text_BS: np.ndarray, lengths_B: np.ndarray, key: jax.Array | None, sampling: Sampling
    ) -> Guesses:
        """Return the guesses after each text."""
        tokens_BP = np.zeros((len(text_BS), self.num_tokens), np.int32)
        counts_B = np.zeros(len(text_BS), np.int32)
        for row, length in enumerate(lengths_B):
            found = self._after_last_match(text_BS[row, :length])
            counts_B[row] = len(found)
            tokens_BP[row, : len(found)] = found
        return Guesses(tokens_BP, counts_B)

    def keep(self, lengths_B: np.ndarray) -> None:
        """Forget nothing: the text is given each time."""

    def _after_last_match(self, text: np.ndarray) -> np.ndarray:
        """Return what followed the last earlier place of the longest ending that has one."""
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            # The ending itself is no earlier place, so its last token has no window.
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            places = np.flatnonzero((windows == text[-size:]).all(axis=1))
            if len(places):
                return text[places[-1] + size :][: self.num_tokens]
        return text[:0]


class DraftModel:
    """Guesses by another model, which has a cache of its own.

    Args:
        model: of the same vocabulary, or a Decoder of it.
        num_tokens: P, guesses of a call.
    """

    def __init__(self, model: GPT | Decoder, num_tokens: int = 5):
        self._model, self.num_tokens = model, num_tokens

    def start(self, tokens_BT: np.ndarray, counts_B: np.ndarray, capacity: int) -> None:
        """Read the prompts."""
        model = self._model
        self._decoder = model if isinstance(model, Decoder) else Decoder(model, len(counts_B))
        self._capacity = min(capacity, self._decoder.config.context_length)
        _, self._cache = self._decoder.prefill(tokens_BT, counts_B, self._capacity)

    def guess(
        self, text_BS: np.ndarray, lengths_B: np.ndarray, key: jax.Array | None, sampling: Sampling
    ) -> Guesses:
        """Return the guesses after each text, fewer where the context ends."""
        batch_size = len(text_BS)
        num = max(min(self.num_tokens, self._capacity - int(lengths_B.max())), 0)
        tokens_BP = np.zeros((batch_size, self.num_tokens), np.int32)
        tokens_B = jnp.asarray(text_BS[np.arange(batch_size), lengths_B - 1], jnp.int32)
        drawn = []
        # One step more than there are guesses, so that the cache holds the last one too.
        for step in range(num + 1 if num else 0):
            logits_BV, self._cache = self._decoder.advance(tokens_B, self._cache)
            if step == num:
                break
            scores_BV = widened(logits_BV)
            if key is not None:
                scores_BV = filter_logits(logits_BV, sampling)
                drawn.append(jax.nn.softmax(scores_BV, axis=-1))
                scores_BV = random.perturb(random.fold_in(key, step), scores_BV)
            tokens_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
            tokens_BP[:, step] = np.asarray(tokens_B)
        # Of guesses that were not made nothing is read.
        drawn += drawn[-1:] * (self.num_tokens - len(drawn))
        return Guesses(
            tokens_BP,
            np.full(batch_size, num, np.int32),
            jnp.stack(drawn, axis=1) if drawn else None,
        )

    def keep(self, lengths_B: np.ndarray) -> None:
        """Cut the cache back to texts of these lengths, whose last token it has not read."""
        held_B = np.asarray(self._cache.lengths_B)
        self._cache = _cut(self._cache, np.minimum(lengths_B - 1, held_B))


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Tokens that `speculate` wrote, and what the guesses were worth.

    Attributes:
        tokens_BG: the new tokens; NO_TOKEN after a row's stop.
        counts_B: new tokens per row, the stop among them.
        margins_BG: by how much a token's logit beat the second best, which tells where a call of
            several tokens may choose otherwise than single steps; NaN where tokens are drawn, and
            after a row's stop.
        calls: of the model after the prompts.
        guessed_P: guesses at each place of a call, over all calls and rows.
        accepted_P: those of them that were kept.
    """

    tokens_BG: np.ndarray
    counts_B: np.ndarray
    margins_BG: np.ndarray
    calls: int
    guessed_P: np.ndarray
    accepted_P: np.ndarray

    @property
    def tokens_per_call(self) -> float:
        """New tokens of a row in a call; the first comes from the prompt."""
        return float(self.counts_B.mean() - 1.0) / self.calls if self.calls else 1.0


def speculate(
    model: GPT | Decoder,
    tokens_BT: ArrayLike,
    max_new_tokens: int,
    draft: PromptLookup | DraftModel,
    counts_B: ArrayLike | None = None,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
) -> Speculation:
    """Continue each prompt as `generate` does, several tokens to a call of the model.

    Greedy tokens are those of `generate`, except where a margin is thinner than the rounding of a
    call of several tokens; with a `BatchInvariantDecoder` there is none, but each guess then costs
    a call. Drawn tokens are others, from the same distribution.

    Args:
        model: or a Decoder of it.
        tokens_BT: prompts, padded on the right.
        max_new_tokens: G.
        draft: where guesses come from.
        counts_B: real tokens per prompt; None for T.
        stop_ids: ids that end a row; a stop is part of the row's output.
        sampling: how a token is chosen from its logits; the most likely one when not given.
        key: draws the tokens; None when nothing is drawn.

    Returns:
        The new tokens, and how many guesses were right.

    Raises:
        ValueError: as `generate`.
    """
    asked = max_new_tokens, sampling, key
    counts_B = check_prompts(model.config, tokens_BT, counts_B, *asked, who="speculate")
    if sampling.temperature == 0.0:
        sampling, key = GREEDY, None
    tokens_BT = np.asarray(tokens_BT)[:, : model.config.context_length]  # beyond is padding
    decoder = model if isinstance(model, Decoder) else Decoder(model, len(counts_B))
    capacity = capacity_for(int(counts_B.max()) + max_new_tokens, model.config)
    text = _Text(tokens_BT, counts_B, max_new_tokens, stop_ids)
    logits_BV, cache = decoder.prefill(tokens_BT, counts_B, capacity)
    draft.start(tokens_BT, counts_B, capacity)
    ones_B = np.ones_like(counts_B)
    first = Guesses(np.zeros((len(ones_B), 0), np.int32), 0 * ones_B)
    text.append(*_host(_accept(logits_BV[:, None], *_arrays(first), _folded(key, 0), sampling)))
    calls, guessed_P = 0, np.zeros(draft.num_tokens, int)
    accepted_P = np.zeros_like(guessed_P)
    while not text.ended_B.all():
        calls += 1
        new_key, drawing = _folded(key, 2 * calls), _folded(key, 2 * calls + 1)
        guesses = text.fitting(draft.guess(text.tokens_BS, text.lengths_B, drawing, sampling))
        chunk = text.with_last(guesses)
        logits, longer = _extend(decoder, chunk, guesses.counts_B + 1, cache)
        found = _host(_accept(logits, *_arrays(guesses), new_key, sampling))
        right_B = np.where(text.ended_B, 0, found[1] - 1)
        guessed_P += np.sum(np.arange(len(guessed_P)) < guesses.counts_B[:, None], axis=0)
        accepted_P += np.sum(np.arange(len(guessed_P)) < right_B[:, None], axis=0)
        text.append(*found)
        cache = _kept(decoder, cache, longer, chunk, text.lengths_B)
        draft.keep(text.lengths_B)
    return Speculation(*text.written(), calls, guessed_P, accepted_P)


def rejection_rule(wanted_BV: jax.Array, guessed_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return when to accept a guess, and what to draw instead of one that is refused.

    Guesses drawn from `guessed_BV`, with those refused replaced, are then draws from `wanted_BV`.

    Args:
        wanted_BV: probabilities of the next token.
        guessed_BV: probabilities from which the guess was drawn.

    Returns:
        The probability of accepting each id (B, V), and the distribution of the other draw (B, V).
    """
    accepted_BV = jnp.minimum(wanted_BV / jnp.where(guessed_BV > 0.0, guessed_BV, 1.0), 1.0)
    left_BV = jnp.maximum(wanted_BV - guessed_BV, 0.0)
    sums_B1 = jnp.sum(left_BV, axis=-1, keepdims=True)
    # Nothing is left where both are the same, and there nothing is refused.
    return accepted_BV, jnp.where(sums_B1 > 0.0, left_BV / sums_B1, wanted_BV)


class _Text:
    """Prompts and what has been written after them, on the host."""

    def __init__(
        self,
        tokens_BT: np.ndarray,
        counts_B: np.ndarray,
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ):
        self._num, self._stops = max_new_tokens, np.asarray(stop_ids, int).reshape(-1)
        self.tokens_BS = np.pad(tokens_BT, ((0, 0), (0, max_new_tokens)))
        self.lengths_B = counts_B.astype(np.int32)
        self._starts_B = self.lengths_B.copy()
        self._margins_BG = np.full((len(counts_B), max_new_tokens), np.nan)
        self.ended_B = np.zeros(len(counts_B), bool)

    def append(self, new_BT: np.ndarray, counts_B: np.ndarray, margins_BT: np.ndarray) -> None:
        """Write new tokens of the rows that go on, up to a stop."""
        for row in np.flatnonzero(~self.ended_B):
            new = new_BT[row, : counts_B[row]]
            stops = np.flatnonzero(np.isin(new, self._stops))
            new = new[: stops[0] + 1] if len(stops) else new
            start, written = self.lengths_B[row], self.lengths_B[row] - self._starts_B[row]
            self.tokens_BS[row, start : start + len(new)] = new
            self._margins_BG[row, written : written + len(new)] = margins_BT[row, : len(new)]
            self.lengths_B[row] += len(new)
            self.ended_B[row] = len(stops) > 0 or written + len(new) == self._num

    def fitting(self, guesses: Guesses) -> Guesses:
        """Return fewer guesses where a row has ended or will; none make a call of one token."""
        left_B = self._num - (self.lengths_B - self._starts_B)
        counts_B = np.where(self.ended_B, 0, np.minimum(guesses.counts_B, left_B - 1))
        if not counts_B.any():
            return Guesses(guesses.tokens_BP[:, :0], counts_B)
        return dataclasses.replace(guesses, counts_B=counts_B)

    def with_last(self, guesses: Guesses) -> np.ndarray:
        """Return each text's last token, which no cache holds, and the guesses after it."""
        last_B = self.tokens_BS[np.arange(len(self.lengths_B)), self.lengths_B - 1]
        return np.concatenate([last_B[:, None], guesses.tokens_BP], axis=1).astype(np.int32)

    def written(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the new tokens, how many they are, and their margins."""
        steps_1G = np.arange(self._num)[None, :]
        counts_B = self.lengths_B - self._starts_B
        tokens_BG = np.take_along_axis(self.tokens_BS, self._starts_B[:, None] + steps_1G, axis=1)
        return (
            np.where(steps_1G < counts_B[:, None], tokens_BG, NO_TOKEN),
            counts_B,
            self._margins_BG,
        )


@functools.partial(jax.jit, static_argnames="sampling")
def _accept(
    logits_BTV: jax.Array,
    tokens_BP: jax.Array,
    counts_B: jax.Array,
    guessed_BPV: jax.Array | None,
    key: jax.Array | None,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the tokens that are written, (B, T), how many they are, and their margins."""
    B, T, V = logits_BTV.shape
    scores_BTV = widened(logits_BTV)
    chosen_BT = jnp.argmax(scores_BTV, axis=-1).astype(jnp.int32)
    others_BTV = jnp.where(jax.nn.one_hot(chosen_BT, V, dtype=bool), -jnp.inf, scores_BTV)
    margins_BT = jnp.max(scores_BTV, axis=-1) - jnp.max(others_BTV, axis=-1)
    real_BP = jnp.arange(T - 1)[None, :] < counts_B[:, None]
    if key is None:
        right_BP = real_BP & (tokens_BP == chosen_BT[:, :-1])
        num_B = jnp.sum(jnp.cumprod(right_BP, axis=1), axis=1)
        return chosen_BT, num_B + 1, margins_BT
    wanted_BTV = jax.nn.softmax(filter_logits(logits_BTV.reshape(B * T, V), sampling), axis=-1)
    wanted_BTV = wanted_BTV.reshape(B, T, V)
    if guessed_BPV is None or T == 1:
        guessed_BPV = jax.nn.one_hot(tokens_BP, V, dtype=wanted_BTV.dtype)
    # After the guesses of a row comes a draw from what is wanted there.
    guessed_BPV = jnp.where(real_BP[:, :, None], guessed_BPV.astype(wanted_BTV.dtype), 0.0)
    guessed_BTV = jnp.pad(guessed_BPV, ((0, 0), (0, 1), (0, 0)))
    accepted, instead = rejection_rule(wanted_BTV.reshape(B * T, V), guessed_BTV.reshape(B * T, V))
    chances_BP = jnp.take_along_axis(
        accepted.reshape(B, T, V)[:, :-1], tokens_BP[:, :, None], axis=2
    )[:, :, 0]
    draws_BP = random.uniform(random.fold_in(key, 0), (B, T - 1)).astype(chances_BP.dtype)
    num_B = jnp.sum(jnp.cumprod(real_BP & (draws_BP < chances_BP), axis=1), axis=1)
    instead = jnp.take_along_axis(instead.reshape(B, T, V), num_B[:, None, None], axis=1)[:, 0]
    drawn_B = jnp.argmax(random.perturb(random.fold_in(key, 1), jnp.log(instead)), axis=-1)
    kept_BT = jnp.arange(T)[None, :] < num_B[:, None]
    guessed_BT = jnp.pad(tokens_BP, ((0, 0), (0, 1)))
    new_BT = jnp.where(kept_BT, guessed_BT, drawn_B[:, None].astype(jnp.int32))
    return new_BT, num_B + 1, jnp.full_like(margins_BT, jnp.nan)


def _extend(
    decoder: Decoder, chunk_BT: np.ndarray, counts_B: np.ndarray, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Return the logits after every token of a call, and the cache that holds them all."""
    tokens, counts = jnp.asarray(chunk_BT), jnp.asarray(counts_B, jnp.int32)
    # twin: jax gives the memory of the cache away; in torch the newest handle writes into it.
    if isinstance(cache, KVCache):
        return decoder.run(_logits, tokens, counts, state=cache)
    steps = range(1, tokens.shape[1] + 1)
    ends = [jnp.minimum(counts, step) for step in steps]
    found = [decoder.run(_step, tokens, cache, x) for x in ends]
    return jnp.stack([logits_BV for logits_BV, _ in found], axis=1), found[-1][1]


def _logits(
    model: GPT, chunk_BT: jax.Array, counts_B: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Call the model."""
    found, longer = model(chunk_BT, cache, counts_B)
    assert longer is not None  # it was given a cache
    return found, longer


def _step(
    model: GPT, chunk_BT: jax.Array, cache: BatchInvariantCache, counts_B: jax.Array
) -> tuple[jax.Array, BatchInvariantCache]:
    """Call the model so that only the last of `counts_B` tokens is scored."""
    return batch_invariant.prefill(model, chunk_BT, cache, counts_B)


def _kept(
    decoder: Decoder, cache: Cache, longer: Cache, chunk_BT: np.ndarray, lengths_B: np.ndarray
) -> Cache:
    """Return a cache of all but the last token of texts of these lengths."""
    if isinstance(longer, KVCache):
        return _cut(longer, np.minimum(lengths_B - 1, np.asarray(longer.lengths_B)))
    # The old handle is still there, so nothing has to be undone. A row that has ended stays.
    assert isinstance(cache, BatchInvariantCache)
    new_B = jnp.asarray(lengths_B, jnp.int32) - 1 - cache.lengths_B
    longer = decoder.run(_step, jnp.asarray(chunk_BT), cache, jnp.maximum(new_B, 1))[1]
    lengths = jnp.where(new_B > 0, longer.blocks.lengths_B, cache.blocks.lengths_B)
    tokens = jnp.where(new_B[:, None] > 0, longer.tokens_BP, cache.tokens_BP)
    ends = jnp.where(new_B > 0, longer.lengths_B, cache.lengths_B)
    return BatchInvariantCache(KVCache(longer.blocks.layers, lengths), tokens, ends)


def _cut(cache: KVCache, lengths_B: np.ndarray) -> KVCache:
    """Return the cache cut back to these lengths; the longer one is given up."""
    # twin: nobody else has the longer cache, so torch may write into its slots again.
    return cache.truncate(jnp.asarray(lengths_B, jnp.int32))


def _folded(key: jax.Array | None, number: int) -> jax.Array | None:
    return None if key is None else random.fold_in(key, number)


def _arrays(guesses: Guesses) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    tokens_BP, counts_B = jnp.asarray(guesses.tokens_BP), jnp.asarray(guesses.counts_B)
    return tokens_BP, counts_B, guesses.probabilities_BPV


def _host(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x) for x in arrays)
