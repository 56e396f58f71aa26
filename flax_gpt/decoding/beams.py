"""Beam search: the likeliest continuations of each prompt, by `select` on the rows of a cache.

Read beside torch_gpt/decoding/beams.py.

Dimension key: B prompts, R beams of a prompt, T prompt tokens, G generated tokens, V vocab, P best
candidates of a step. The rows of the model are beams, those of one prompt next to each other.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_gpt.decoding.decoder import Decoder, capacity_for
from flax_gpt.decoding.generate import NO_TOKEN, check_prompts
from flax_gpt.decoding.sampling import widened
from flax_gpt.model import GPT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """Continuations of each prompt, the best first.

    Attributes:
        tokens_BRG: the new tokens; NO_TOKEN after a beam's stop.
        counts_BR: new tokens of each beam, the stop among them; 0 where there is no other beam.
        logprobs_BRG: of each token after those before it; NaN where there is none.
        scores_BR: their sum divided by counts_BR ** length_penalty; -inf where there is no beam.
    """

    tokens_BRG: jax.Array
    counts_BR: jax.Array
    logprobs_BRG: jax.Array
    scores_BR: jax.Array


def beam_search(
    model: GPT | Decoder,
    tokens_BT: ArrayLike,
    beams: int,
    max_new_tokens: int,
    counts_B: ArrayLike | None = None,
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
    first_B1 = np.arange(len(counts_B))[:, None] * beams
    rows = np.repeat(np.arange(len(counts_B)), beams)
    decoder = model if isinstance(model, Decoder) else Decoder(model, len(rows))
    tokens_BT = np.asarray(tokens_BT)[:, : model.config.context_length]  # beyond is padding
    capacity = capacity_for(int(counts_B.max()) + max_new_tokens - 1, model.config)
    logits, cache = decoder.prefill(tokens_BT, counts_B, capacity)
    logits, cache = logits[rows], cache.select(jnp.asarray(rows))
    live = finished = _no_beams(logits, (len(counts_B), beams, max_new_tokens))
    # All rows of a prompt are equal so far, so one stands for them.
    first_1R = jnp.arange(beams)[None, :] == 0
    live = dataclasses.replace(live, scores_BR=jnp.where(first_1R, 0.0, live.scores_BR))
    open_B = jnp.ones(len(counts_B), bool)
    stops = jnp.asarray(stop_ids, jnp.int32).reshape(-1)
    for step in range(max_new_tokens):
        now = (step + 1) ** length_penalty
        most = max_new_tokens**length_penalty if length_penalty > 0.0 else now
        arguments = logits, live, finished, open_B, stops, step, now, most
        live, finished, open_B, parents_BR = _choose(*arguments)
        if step + 1 == max_new_tokens or not bool(jnp.any(open_B)):
            break
        rows = first_B1 + parents_BR
        tokens = live.tokens_BRG[:, :, step].reshape(-1)
        logits, cache = decoder.advance(tokens, cache.select(rows.reshape(-1)))
    return finished


@jax.jit
def _choose(
    logits: jax.Array,
    live: Beams,
    finished: Beams,
    open_B: jax.Array,
    stop_ids: jax.Array,
    step: int,
    now: float,
    most: float,
) -> tuple[Beams, Beams, jax.Array, jax.Array]:
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
    logprobs_BRV = jax.nn.log_softmax(widened(logits), axis=-1).reshape(B, R, -1)
    V = logprobs_BRV.shape[2]
    totals = (live.scores_BR[:, :, None] + logprobs_BRV).reshape(B, R * V)
    # As many as are sure to hold R that do not stop, or all there are.
    totals_BP, chosen_BP = _best(totals, min((1 + max(len(stop_ids), 1)) * R, R * V))
    parents_BP, ids_BP = chosen_BP // V, chosen_BP % V
    chosen = jnp.take_along_axis(logprobs_BRV.reshape(B, R * V), chosen_BP, axis=1)
    tokens, counts, logprobs, _ = _gather(live, parents_BP)
    tokens = tokens.at[:, :, step].set(ids_BP)
    logprobs = logprobs.at[:, :, step].set(chosen)
    candidates = Beams(tokens, counts + 1, logprobs, totals_BP)

    ends_BP = jnp.any(ids_BP[:, :, None] == stop_ids[None, None, :], axis=2) | (step + 1 == G)
    counted_BP = ends_BP & open_B[:, None] & (jnp.arange(ids_BP.shape[1]) < R)[None, :]
    ended = dataclasses.replace(
        candidates, scores_BR=jnp.where(counted_BP, totals_BP / now, -jnp.inf)
    )
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), finished, ended)
    finished = Beams(*_gather(both, _best(both.scores_BR, R)[1]))
    scores_BR, order_BR = _best(jnp.where(ends_BP, -jnp.inf, totals_BP), R)
    live = dataclasses.replace(Beams(*_gather(candidates, order_BR)), scores_BR=scores_BR)
    open_B = open_B & (scores_BR[:, 0] / most > finished.scores_BR[:, -1])
    return live, finished, open_B, jnp.take_along_axis(parents_BP, order_BR, axis=1)


def _no_beams(logits: jax.Array, shape: tuple[int, int, int]) -> Beams:
    """Return beams (B, R, G) that hold nothing, and that every other one beats."""
    tokens_BRG = jnp.full(shape, NO_TOKEN, jnp.int32)
    logprobs_BRG = jnp.full(shape, jnp.nan, widened(logits).dtype)
    scores_BR = jnp.full(shape[:2], -jnp.inf, logprobs_BRG.dtype)
    return Beams(tokens_BRG, jnp.zeros(shape[:2], jnp.int32), logprobs_BRG, scores_BR)


def _best(scores: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Return the `num` highest of each row and their places; of equals the first comes first."""
    # twin: lax.top_k keeps equals in order; torch.topk promises no order.
    return jax.lax.top_k(scores, min(num, scores.shape[1]))


def _gather(beams: Beams, order_BP: jax.Array) -> tuple[jax.Array, ...]:
    """Return the fields of the beams at these places of their rows."""
    fields = beams.tokens_BRG, beams.counts_BR, beams.logprobs_BRG, beams.scores_BR
    places = (order_BP.reshape(*order_BP.shape, *[1] * (x.ndim - 2)) for x in fields)
    return tuple(jnp.take_along_axis(x, i, axis=1) for x, i in zip(fields, places, strict=True))
