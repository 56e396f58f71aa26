"""Generation: tokens chosen from logits, one after the other.

Read beside flax_gpt/decoding/generate.py.

Dimension key: B batch, T prompt tokens, S sequence slots, G generated tokens, V vocab.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from torch_gpt import random
from torch_gpt.cache import KVCache
from torch_gpt.config import GPTConfig
from torch_gpt.decoding.decoder import Decoder, capacity_for
from torch_gpt.decoding.sampling import GREEDY, Sampling, filter_logits, widened
from torch_gpt.model import GPT

NO_TOKEN = -1  # fills a generated row after its stop
_WORTH_PACKING = 8  # new tokens; laying weights out takes as long as it saves in these


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

    tokens_BG: torch.Tensor
    counts_B: torch.Tensor
    margins_BG: torch.Tensor


def generate(
    model: GPT | Decoder,
    tokens_BT: torch.Tensor | np.ndarray,
    max_new_tokens: int,
    counts_B: torch.Tensor | np.ndarray | None = None,
    stop_ids: Sequence[int] = (),
    use_cache: bool = True,
    sampling: Sampling = GREEDY,
    key: torch.Tensor | None = None,
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
    tokens_BT = torch.as_tensor(tokens_BT)[:, : model.config.context_length]  # beyond is padding
    batch_size, num_tokens = tokens_BT.shape
    packed = max_new_tokens >= _WORTH_PACKING
    decoder = model if isinstance(model, Decoder) else Decoder(model, batch_size, packed)
    # twin: jax compiles the whole loop, once for all that need as much room; torch takes one step
    # after the other.
    # The last token is chosen and not appended.
    capacity = capacity_for(int(counts_B.max()) + max_new_tokens - 1, model.config)
    device = decoder.model.token_embedding.weight.device
    if use_cache:
        logits_BV, state = decoder.prefill(tokens_BT, counts_B, capacity)
    else:
        sequences_BS = F.pad(tokens_BT.to(device).long(), (0, capacity - num_tokens))
        state = sequences_BS, torch.as_tensor(counts_B, device=device).long()
        logits_BV = decoder.steps.score_uncached(decoder.model, *state)
    stops = torch.as_tensor(stop_ids, device=device).long().reshape(-1)
    key = None if key is None else key.to(device)
    operands = logits_BV, stops, key, max_new_tokens
    tokens_BG, margins_BG, _ = _loop(decoder, *operands, state, sampling)
    return Generation(tokens_BG, torch.sum(tokens_BG != NO_TOKEN, dim=1), margins_BG)


def right_pad(tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert left-padded batches, as Hugging Face tokenizers make them, to right-padded ones.

    Args:
        tokens_BT: rows padded on either side.
        mask_BT: 1 for real tokens, 0 for padding.

    Returns:
        tokens_BT with each row's real tokens first, and counts_B.

    Raises:
        ValueError: when padding lies between real tokens.
    """
    real_BT = np.asarray(torch.as_tensor(mask_BT).cpu()).astype(bool)
    starts_BT = real_BT & ~np.pad(real_BT, ((0, 0), (1, 0)))[:, :-1]
    for row in np.flatnonzero(starts_BT.sum(axis=1) > 1)[:1]:
        raise ValueError(
            f"right_pad: row {row} has padding between its tokens. A row is one run of tokens. Pad "
            "on one side or both."
        )
    order_BT = np.argsort(~real_BT, axis=1, kind="stable")
    tokens_BT = torch.as_tensor(tokens_BT)
    order_BT = torch.as_tensor(order_BT, device=tokens_BT.device)
    tokens_BT = torch.take_along_dim(tokens_BT, order_BT, dim=1)
    return tokens_BT, torch.as_tensor(real_BT.sum(axis=1), device=tokens_BT.device)


@torch.no_grad()
def _loop(
    decoder: Decoder,
    logits_BV: torch.Tensor,
    stop_ids: torch.Tensor,
    key: torch.Tensor | None,
    max_new_tokens: int,
    state: KVCache | tuple[torch.Tensor, torch.Tensor],
    sampling: Sampling,
) -> tuple[torch.Tensor, torch.Tensor, KVCache | tuple[torch.Tensor, torch.Tensor]]:
    """Run all of `generate` after the prompts, on the device.

    Args:
        decoder: of the model.
        logits_BV: after the prompts.
        stop_ids: ids that end a row.
        key: draws the tokens; None when nothing is drawn.
        max_new_tokens: after which every row ends.
        state: the cache, or the sequences and their lengths.
        sampling: how a token is chosen.

    Returns:
        Tokens and margins, and the state at the end, which has the memory of the one given.
    """
    cached = not isinstance(state, tuple)
    B, device = logits_BV.shape[0], logits_BV.device
    rows_B = torch.arange(B, device=device)

    def extend(tokens_B, state):
        """Append one token per row and score the next."""
        if cached:
            return decoder.advance(tokens_B, state)
        sequences_BS, lengths_B = state
        sequences_BS[rows_B, lengths_B] = tokens_B
        state = sequences_BS, lengths_B + 1
        return decoder.steps.score_uncached(decoder.model, *state), state

    def choose(step, logits_BV, ended_B, tokens_BG, margins_BG):
        """Choose the next token of each row, write it down, and note which rows have ended."""
        scores_BV = widened(logits_BV)
        if key is not None:
            left_BV = filter_logits(logits_BV, sampling)
            scores_BV = random.perturb(random.fold_in(key, step), left_BV)
        tokens_B = torch.argmax(scores_BV, dim=-1)
        second_B = torch.amax(scores_BV.scatter(-1, tokens_B[:, None], -torch.inf), dim=-1)
        margins_B = torch.amax(scores_BV, dim=-1) - second_B
        tokens_BG[:, step] = torch.where(ended_B, NO_TOKEN, tokens_B)
        margins_BG[:, step] = torch.where(ended_B, torch.nan, margins_B)
        stops_B = torch.any(tokens_B[:, None] == stop_ids[None, :], dim=1)
        return tokens_B, ended_B | stops_B

    ended_B = torch.zeros_like(rows_B, dtype=torch.bool)
    tokens_BG = torch.full((B, max_new_tokens), NO_TOKEN, device=device)
    margins_BG = torch.full_like(tokens_BG, torch.nan, dtype=widened(logits_BV).dtype)
    tokens_B, ended_B = choose(0, logits_BV, ended_B, tokens_BG, margins_BG)
    for step in range(1, max_new_tokens):
        if bool(torch.all(ended_B)):
            break
        logits_BV, state = extend(tokens_B, state)
        tokens_B, ended_B = choose(step, logits_BV, ended_B, tokens_BG, margins_BG)
    return tokens_BG, margins_BG, state


def check_prompts(
    config: GPTConfig,
    tokens_BT: torch.Tensor | np.ndarray,
    counts_B: torch.Tensor | np.ndarray | None,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: torch.Tensor | None = None,
    who: str = "generate",
) -> np.ndarray:
    """Return counts_B on the host, or refuse the request with all that is wrong with it.

    Raises:
        ValueError: with the name of the function that was asked, `who`.
    """
    tokens_BT = np.asarray(torch.as_tensor(tokens_BT).cpu())
    if tokens_BT.ndim != 2 or 0 in tokens_BT.shape:
        raise ValueError(
            f"{who}: prompts of shape {tokens_BT.shape}. A prompt is at least one token, and a "
            "batch is (B, T). Give every row a token."
        )
    B, T = tokens_BT.shape
    counts_B = np.full(B, T) if counts_B is None else np.asarray(torch.as_tensor(counts_B).cpu())
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
