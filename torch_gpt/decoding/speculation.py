"""Speculation: several tokens guessed, scored in one call, and kept as far as they are right.

Read beside flax_gpt/decoding/speculation.py.

The guesses come from a smaller model or from the text itself. A cache that holds them is cut back
to those that are kept, which is why it costs nothing to be wrong but the call. Greedy tokens are
those of `generate`; drawn ones have the same distribution, by the rule of Leviathan et al., "Fast
inference from transformers via speculative decoding", 2023.

Dimension key: B batch, T tokens of one call, S tokens of a text, G generated tokens, P guesses,
V vocab.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from torch_gpt import random
from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.decoding import batch_invariant
from torch_gpt.decoding.batch_invariant import BatchInvariantCache
from torch_gpt.decoding.decoder import Decoder, capacity_for
from torch_gpt.decoding.generate import NO_TOKEN, check_prompts
from torch_gpt.decoding.sampling import GREEDY, Sampling, filter_logits, widened
from torch_gpt.model import GPT

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
    probabilities_BPV: torch.Tensor | None = None


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
        self,
        text_BS: np.ndarray,
        lengths_B: np.ndarray,
        key: torch.Tensor | None,
        sampling: Sampling,
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
        self,
        text_BS: np.ndarray,
        lengths_B: np.ndarray,
        key: torch.Tensor | None,
        sampling: Sampling,
    ) -> Guesses:
        """Return the guesses after each text, fewer where the context ends."""
        batch_size = len(text_BS)
        num = max(min(self.num_tokens, self._capacity - int(lengths_B.max())), 0)
        tokens_BP = np.zeros((batch_size, self.num_tokens), np.int32)
        last_B = text_BS[np.arange(batch_size), lengths_B - 1]
        tokens_B = torch.as_tensor(last_B, device=self._cache.lengths_B.device).long()
        drawn = []
        # One step more than there are guesses, so that the cache holds the last one too.
        for step in range(num + 1 if num else 0):
            logits_BV, self._cache = self._decoder.advance(tokens_B, self._cache)
            if step == num:
                break
            scores_BV = widened(logits_BV)
            if key is not None:
                scores_BV = filter_logits(logits_BV, sampling)
                drawn.append(torch.softmax(scores_BV, dim=-1))
                scores_BV = random.perturb(random.fold_in(key, step), scores_BV)
            tokens_B = torch.argmax(scores_BV, dim=-1)
            tokens_BP[:, step] = tokens_B.cpu().numpy()
        # Of guesses that were not made nothing is read.
        drawn += drawn[-1:] * (self.num_tokens - len(drawn))
        return Guesses(
            tokens_BP,
            np.full(batch_size, num, np.int32),
            torch.stack(drawn, dim=1) if drawn else None,
        )

    def keep(self, lengths_B: np.ndarray) -> None:
        """Cut the cache back to texts of these lengths, whose last token it has not read."""
        held_B = self._cache.lengths_B.cpu().numpy()
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
    tokens_BT: torch.Tensor | np.ndarray,
    max_new_tokens: int,
    draft: PromptLookup | DraftModel,
    counts_B: torch.Tensor | np.ndarray | None = None,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    key: torch.Tensor | None = None,
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
    tokens_BT = np.asarray(torch.as_tensor(tokens_BT).cpu())
    tokens_BT = tokens_BT[:, : model.config.context_length]  # beyond is padding
    decoder = model if isinstance(model, Decoder) else Decoder(model, len(counts_B))
    capacity = capacity_for(int(counts_B.max()) + max_new_tokens, model.config)
    text = _Text(tokens_BT, counts_B, max_new_tokens, stop_ids)
    logits_BV, cache = decoder.prefill(tokens_BT, counts_B, capacity)
    draft.start(tokens_BT, counts_B, capacity)
    ones_B = np.ones_like(counts_B)
    first = Guesses(np.zeros((len(ones_B), 0), np.int32), 0 * ones_B)
    text.append(
        *_host(
            _accept(
                logits_BV[:, None], *_arrays(first, logits_BV.device), _folded(key, 0), sampling
            )
        )
    )
    calls, guessed_P = 0, np.zeros(draft.num_tokens, int)
    accepted_P = np.zeros_like(guessed_P)
    while not text.ended_B.all():
        calls += 1
        new_key, drawing = _folded(key, 2 * calls), _folded(key, 2 * calls + 1)
        guesses = text.fitting(draft.guess(text.tokens_BS, text.lengths_B, drawing, sampling))
        chunk = text.with_last(guesses)
        logits, longer = _extend(decoder, chunk, guesses.counts_B + 1, cache)
        found = _host(_accept(logits, *_arrays(guesses, logits.device), new_key, sampling))
        right_B = np.where(text.ended_B, 0, found[1] - 1)
        guessed_P += np.sum(np.arange(len(guessed_P)) < guesses.counts_B[:, None], axis=0)
        accepted_P += np.sum(np.arange(len(guessed_P)) < right_B[:, None], axis=0)
        text.append(*found)
        cache = _kept(decoder, cache, longer, chunk, text.lengths_B)
        draft.keep(text.lengths_B)
    return Speculation(*text.written(), calls, guessed_P, accepted_P)


def rejection_rule(
    wanted_BV: torch.Tensor, guessed_BV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return when to accept a guess, and what to draw instead of one that is refused.

    Guesses drawn from `guessed_BV`, with those refused replaced, are then draws from `wanted_BV`.

    Args:
        wanted_BV: probabilities of the next token.
        guessed_BV: probabilities from which the guess was drawn.

    Returns:
        The probability of accepting each id (B, V), and the distribution of the other draw (B, V).
    """
    divisor_BV = torch.where(guessed_BV > 0.0, guessed_BV, 1.0)
    accepted_BV = torch.clamp(wanted_BV / divisor_BV, max=1.0)
    left_BV = torch.clamp(wanted_BV - guessed_BV, min=0.0)
    sums_B1 = torch.sum(left_BV, dim=-1, keepdim=True)
    # Nothing is left where both are the same, and there nothing is refused.
    return accepted_BV, torch.where(sums_B1 > 0.0, left_BV / sums_B1, wanted_BV)


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


@torch.no_grad()
def _accept(
    logits_BTV: torch.Tensor,
    tokens_BP: torch.Tensor,
    counts_B: torch.Tensor,
    guessed_BPV: torch.Tensor | None,
    key: torch.Tensor | None,
    sampling: Sampling,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tokens that are written, (B, T), how many they are, and their margins."""
    B, T, V = logits_BTV.shape
    scores_BTV, device = widened(logits_BTV), logits_BTV.device
    chosen_BT = torch.argmax(scores_BTV, dim=-1)
    second_BT = torch.amax(scores_BTV.scatter(-1, chosen_BT[:, :, None], -torch.inf), dim=-1)
    margins_BT = torch.amax(scores_BTV, dim=-1) - second_BT
    real_BP = torch.arange(T - 1, device=device)[None, :] < counts_B[:, None]
    if key is None:
        right_BP = real_BP & (tokens_BP == chosen_BT[:, :-1])
        num_B = torch.sum(torch.cumprod(right_BP.long(), dim=1), dim=1)
        return chosen_BT, num_B + 1, margins_BT
    wanted_BTV = torch.softmax(filter_logits(logits_BTV.reshape(B * T, V), sampling), dim=-1)
    wanted_BTV = wanted_BTV.reshape(B, T, V)
    if guessed_BPV is None or T == 1:
        guessed_BPV = F.one_hot(tokens_BP, V)
    # After the guesses of a row comes a draw from what is wanted there.
    guessed_BPV = torch.where(real_BP[:, :, None], guessed_BPV.to(wanted_BTV.dtype), 0.0)
    guessed_BTV = F.pad(guessed_BPV, (0, 0, 0, 1))
    accepted, instead = rejection_rule(wanted_BTV.reshape(B * T, V), guessed_BTV.reshape(B * T, V))
    chances_BP = torch.take_along_dim(
        accepted.reshape(B, T, V)[:, :-1], tokens_BP[:, :, None], dim=2
    )[:, :, 0]
    draws_BP = random.uniform(random.fold_in(key, 0), (B, T - 1)).to(chances_BP.dtype)
    right_BP = real_BP & (draws_BP < chances_BP)
    num_B = torch.sum(torch.cumprod(right_BP.long(), dim=1), dim=1)
    instead = torch.take_along_dim(instead.reshape(B, T, V), num_B[:, None, None], dim=1)[:, 0]
    drawn_B = torch.argmax(random.perturb(random.fold_in(key, 1), torch.log(instead)), dim=-1)
    kept_BT = torch.arange(T, device=device)[None, :] < num_B[:, None]
    new_BT = torch.where(kept_BT, F.pad(tokens_BP, (0, 1)), drawn_B[:, None])
    return new_BT, num_B + 1, torch.full_like(margins_BT, torch.nan)


def _extend(
    decoder: Decoder, chunk_BT: np.ndarray, counts_B: np.ndarray, cache: Cache
) -> tuple[torch.Tensor, Cache]:
    """Return the logits after every token of a call, and the cache that holds them all."""
    device = cache.lengths_B.device
    tokens_BT = torch.as_tensor(chunk_BT, device=device).long()
    counts = torch.as_tensor(counts_B, device=device).long()
    # twin: jax gives the memory of the cache away; in torch the newest handle writes into it.
    if isinstance(cache, KVCache):
        return _logits(decoder.model, tokens_BT, counts, cache)
    steps = range(1, tokens_BT.shape[1] + 1)
    ends = [torch.clamp(counts, max=step) for step in steps]
    found = [_step(decoder.model, tokens_BT, cache, x) for x in ends]
    return torch.stack([logits_BV for logits_BV, _ in found], dim=1), found[-1][1]


@torch.no_grad()
def _logits(
    model: GPT, chunk_BT: torch.Tensor, counts_B: torch.Tensor, cache: KVCache
) -> tuple[torch.Tensor, KVCache]:
    """Call the model."""
    found, longer = model(chunk_BT, cache, counts_B)
    assert longer is not None  # it was given a cache
    return found, longer


def _step(
    model: GPT, chunk_BT: torch.Tensor, cache: BatchInvariantCache, counts_B: torch.Tensor
) -> tuple[torch.Tensor, BatchInvariantCache]:
    """Call the model so that only the last of `counts_B` tokens is scored."""
    return batch_invariant.prefill(model, chunk_BT, cache, counts_B)


def _kept(
    decoder: Decoder, cache: Cache, longer: Cache, chunk_BT: np.ndarray, lengths_B: np.ndarray
) -> Cache:
    """Return a cache of all but the last token of texts of these lengths."""
    if isinstance(longer, KVCache):
        return _cut(longer, np.minimum(lengths_B - 1, longer.lengths_B.cpu().numpy()))
    # The old handle is still there, so nothing has to be undone. A row that has ended stays.
    assert isinstance(cache, BatchInvariantCache)
    device = cache.lengths_B.device
    new_B = torch.as_tensor(lengths_B, device=device).long() - 1 - cache.lengths_B
    tokens_BT = torch.as_tensor(chunk_BT, device=device).long()
    longer = _step(decoder.model, tokens_BT, cache, torch.clamp(new_B, min=1))[1]
    lengths = torch.where(new_B > 0, longer.blocks.lengths_B, cache.blocks.lengths_B)
    tokens = torch.where(new_B[:, None] > 0, longer.tokens_BP, cache.tokens_BP)
    ends = torch.where(new_B > 0, longer.lengths_B, cache.lengths_B)
    return BatchInvariantCache(KVCache(longer.blocks.layers, lengths), tokens, ends)


def _cut(cache: KVCache, lengths_B: np.ndarray) -> KVCache:
    """Return the cache cut back to these lengths; the longer one is given up."""
    # twin: nobody else has the longer cache, so torch may write into its slots again.
    shorter = cache.truncate(torch.as_tensor(lengths_B))
    pairs = [(layer.keys_BKSH, layer.values_BKSH) for layer in shorter.layers]
    layers = tuple(LayerCache(*pair)._owned(shorter.lengths_B) for pair in pairs)
    return KVCache(layers, shorter.lengths_B)


def _folded(key: torch.Tensor | None, number: int) -> torch.Tensor | None:
    return None if key is None else random.fold_in(key, number)


def _arrays(
    guesses: Guesses, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    tokens_BP, counts_B = torch.as_tensor(guesses.tokens_BP), torch.as_tensor(guesses.counts_B)
    return tokens_BP.long().to(device), counts_B.to(device), guesses.probabilities_BPV


def _host(arrays: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, ...]:
    return tuple(x.cpu().numpy() for x in arrays)
