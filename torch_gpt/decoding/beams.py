"""Beam search: the likeliest continuations of each prompt, by `select` on the rows of a cache.

Read beside flax_gpt/decoding/beams.py.

Dimension key: B prompts, R beams of a prompt, T prompt tokens, G generated tokens, V vocab, P best
candidates of a step. The rows of the model are beams, those of one prompt next to each other.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from torch_gpt.decoding.decoder import Decoder, capacity_for
from torch_gpt.decoding.generate import NO_TOKEN, check_prompts
from torch_gpt.decoding.sampling import widened
from torch_gpt.model import GPT


@dataclasses.dataclass(frozen=True)
class Beams:
    """Continuations of each prompt, the best first.

    Attributes:
        tokens_BRG: the new tokens; NO_TOKEN after a beam's stop.
        counts_BR: new tokens of each beam, the stop among them; 0 where there is no other beam.
        logprobs_BRG: of each token after those before it; NaN where there is none.
        scores_BR: their sum divided by counts_BR ** length_penalty; -inf where there is no beam.
    """

    tokens_BRG: torch.Tensor
    counts_BR: torch.Tensor
    logprobs_BRG: torch.Tensor
    scores_BR: torch.Tensor


def beam_search(
    model: GPT | Decoder,
    tokens_BT: torch.Tensor | np.ndarray,
    beams: int,
    max_new_tokens: int,
    counts_B: torch.Tensor | np.ndarray | None = None,
    stop_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
) -> Beams:
    """Continue each prompt by the `beams` likeliest texts that a search of that width finds.

    Each step scores every next token of every live beam and takes the best. A stop ends a beam
    where it is among the `beams` best of its step. The search of a prompt ends when no live beam
    can beat the worst that has ended, or after `max_new_tokens`, which ends all. Of equals the
    earlier beam and the lower id come first.

    Args:
        model: or a Decoder of B * R rows.
        tokens_BT: prompts, padded on the right.
        beams: R.
        max_new_tokens: G.
        counts_B: real tokens per prompt; None for T.
        stop_ids: ids that end a beam; a stop is part of the beam's output.
        length_penalty: above 0 prefers long beams, below 0 short ones.

    Returns:
        The beams, with scores and log-probabilities.

    Raises:
        ValueError: as `generate`, and for fewer than 1 beam.
    """
    if beams < 1:
        raise ValueError(f"beam_search: {beams} beams. A search keeps at least 1. Ask for more.")
    counts_B = check_prompts(model.config, tokens_BT, counts_B, max_new_tokens, who="beam_search")
    rows = torch.arange(len(counts_B)).repeat_interleave(beams)
    decoder = model if isinstance(model, Decoder) else Decoder(model, len(rows))
    tokens_BT = torch.as_tensor(tokens_BT)[:, : model.config.context_length]  # beyond is padding
    capacity = capacity_for(int(counts_B.max()) + max_new_tokens - 1, model.config)
    logits, cache = decoder.prefill(tokens_BT, counts_B, capacity)
    rows = rows.to(logits.device)
    first_B1 = torch.arange(len(counts_B), device=logits.device)[:, None] * beams
    logits, cache = logits[rows], cache.select(rows)
    live = finished = _no_beams(logits, (len(counts_B), beams, max_new_tokens))
    # All rows of a prompt are equal so far, so one stands for them.
    first_1R = torch.arange(beams, device=logits.device)[None, :] == 0
    live = dataclasses.replace(live, scores_BR=torch.where(first_1R, 0.0, live.scores_BR))
    open_B = torch.ones(len(counts_B), dtype=torch.bool, device=logits.device)
    stops = torch.as_tensor(stop_ids, device=logits.device).long().reshape(-1)
    for step in range(max_new_tokens):
        now = (step + 1) ** length_penalty
        most = max_new_tokens**length_penalty if length_penalty > 0.0 else now
        arguments = logits, live, finished, open_B, stops, step, now, most
        live, finished, open_B, parents_BR = _choose(*arguments)
        if step + 1 == max_new_tokens or not bool(torch.any(open_B)):
            break
        rows = first_B1 + parents_BR
        tokens = live.tokens_BRG[:, :, step].reshape(-1)
        logits, cache = decoder.advance(tokens, cache.select(rows.reshape(-1)))
    return finished


@torch.no_grad()
def _choose(
    logits: torch.Tensor,
    live: Beams,
    finished: Beams,
    open_B: torch.Tensor,
    stop_ids: torch.Tensor,
    step: int,
    now: float,
    most: float,
) -> tuple[Beams, Beams, torch.Tensor, torch.Tensor]:
    """Take the best continuations, end those that stop, and see which searches go on.

    Args:
        logits: after each live beam.
        live: beams that go on, with the sums of their log-probabilities as scores.
        finished: beams that have ended.
        open_B: whether a prompt's search still goes on.
        stop_ids: ids that end a beam.
        step: number of the token, from 0.
        now: what the score of a beam that ends here is divided by.
        most: what divides the score that a live beam may still reach.

    Returns:
        Live and finished beams, open_B, and the beam that each live one continues.
    """
    B, R, G = live.tokens_BRG.shape
    logprobs_BRV = torch.log_softmax(widened(logits), dim=-1).reshape(B, R, -1)
    V = logprobs_BRV.shape[2]
    totals = (live.scores_BR[:, :, None] + logprobs_BRV).reshape(B, R * V)
    # As many as are sure to hold R that do not stop, or all there are.
    totals_BP, chosen_BP = _best(totals, min((1 + max(len(stop_ids), 1)) * R, R * V))
    parents_BP, ids_BP = chosen_BP // V, chosen_BP % V
    chosen = torch.take_along_dim(logprobs_BRV.reshape(B, R * V), chosen_BP, dim=1)
    tokens, counts, logprobs, _ = _gather(live, parents_BP)
    tokens[:, :, step] = ids_BP
    logprobs[:, :, step] = chosen
    candidates = Beams(tokens, counts + 1, logprobs, totals_BP)

    ends_BP = torch.any(ids_BP[:, :, None] == stop_ids[None, None, :], dim=2) | (step + 1 == G)
    counted_BP = (
        ends_BP
        & open_B[:, None]
        & (torch.arange(ids_BP.shape[1], device=ids_BP.device) < R)[None, :]
    )
    ended = dataclasses.replace(
        candidates, scores_BR=torch.where(counted_BP, totals_BP / now, -torch.inf)
    )
    pairs = zip(_fields(finished), _fields(ended), strict=True)
    both = Beams(*(torch.cat(pair, dim=1) for pair in pairs))
    finished = Beams(*_gather(both, _best(both.scores_BR, R)[1]))
    scores_BR, order_BR = _best(torch.where(ends_BP, -torch.inf, totals_BP), R)
    live = dataclasses.replace(Beams(*_gather(candidates, order_BR)), scores_BR=scores_BR)
    open_B = open_B & (scores_BR[:, 0] / most > finished.scores_BR[:, -1])
    return live, finished, open_B, torch.take_along_dim(parents_BP, order_BR, dim=1)


def _no_beams(logits: torch.Tensor, shape: tuple[int, int, int]) -> Beams:
    """Return beams (B, R, G) that hold nothing, and that every other one beats."""
    tokens_BRG = torch.full(shape, NO_TOKEN, device=logits.device)
    logprobs_BRG = torch.full_like(tokens_BRG, torch.nan, dtype=widened(logits).dtype)
    scores_BR = torch.full_like(logprobs_BRG[:, :, 0], -torch.inf)
    return Beams(tokens_BRG, torch.zeros_like(tokens_BRG[:, :, 0]), logprobs_BRG, scores_BR)


def _best(scores: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `num` highest of each row and their places; of equals the first comes first."""
    # twin: lax.top_k keeps equals in order; torch.topk promises no order.
    order = torch.argsort(scores, dim=1, stable=True, descending=True)[:, :num]
    return torch.take_along_dim(scores, order, dim=1), order


def _gather(beams: Beams, order_BP: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the fields of the beams at these places of their rows."""
    fields = _fields(beams)
    places = (order_BP.reshape(*order_BP.shape, *[1] * (x.ndim - 2)) for x in fields)
    return tuple(torch.take_along_dim(x, i, dim=1) for x, i in zip(fields, places, strict=True))


def _fields(beams: Beams) -> tuple[torch.Tensor, ...]:
    return beams.tokens_BRG, beams.counts_BR, beams.logprobs_BRG, beams.scores_BR
