"""Beam search against every continuation there is, and against a search over whole sequences."""

import functools
import itertools
import math

import numpy as np
import pytest

B, G = 2, 3
COUNTS = (4, 2)
TOKENS = np.random.default_rng(5).integers(0, 5, (B, 4))
BOUND = 1e-12


@functools.cache
def model_of(gpt):
    """A model of five ids, so that all continuations can be written down."""
    return gpt.model(seed=3, init_std=0.7, vocab_size=5, num_layers=1)


@functools.cache
def table_of(gpt, row):
    """Log-probabilities of the next id after the row's prompt and each beginning, uncached."""
    prompt = TOKENS[row, : COUNTS[row]].tolist()
    table = {}
    for length in range(G):
        beginnings = list(itertools.product(range(5), repeat=length))
        texts = gpt.ints([[*prompt, *beginning] for beginning in beginnings])
        logits = gpt.numpy(model_of(gpt)(texts)[0])[:, -1]
        scores = logits - logits.max(1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(1, keepdims=True))
        table |= dict(zip(beginnings, scores, strict=True))
    return table


def exhaustive(gpt, row, stop_ids, penalty):
    """Every text that ends at a stop or after G tokens, with its score, best first."""
    table, found = table_of(gpt, row), {}
    for text in itertools.product(range(5), repeat=G):
        ends = [g + 1 for g, token in enumerate(text) if token in stop_ids]
        text = text[: min(ends, default=G)]
        found[text] = sum(table[text[:g]][token] for g, token in enumerate(text))
        found[text] /= len(text) ** penalty
    return sorted(found.items(), key=lambda item: -item[1])


def by_hand(gpt, row, beams, stop_ids, penalty):
    """A search of that width with lists, which never ends before G tokens."""
    table, live, ended = table_of(gpt, row), [((), 0.0)], []
    for g in range(1, G + 1):
        candidates = [
            ((*text, token), score + table[text][token])
            for text, score in live
            for token in range(5)
        ]
        candidates.sort(key=lambda item: -item[1])
        stops = [text[-1] in stop_ids or g == G for text, _ in candidates]
        pairs = list(zip(candidates, stops, strict=True))
        ended += [(text, score / g**penalty) for (text, score), stop in pairs[:beams] if stop]
        live = [candidate for candidate, stop in pairs if not stop][:beams]
    return sorted(ended, key=lambda item: -item[1])[:beams]


def searched(gpt, beams, stop_ids=(), penalty=1.0, **options):
    """Fields of the result on the host."""
    found = gpt.package.beam_search(
        model_of(gpt), gpt.ints(TOKENS), beams, G, gpt.ints(COUNTS), stop_ids, penalty, **options
    )
    names = "tokens_BRG", "counts_BR", "logprobs_BRG", "scores_BR"
    return [gpt.numpy(getattr(found, name)) for name in names]


def texts(tokens, counts):
    """The tokens of each beam of a row."""
    return [tuple(x[:n].tolist()) for x, n in zip(tokens, counts, strict=True)]


@pytest.mark.parametrize("stop_ids, penalty", [((), 1.0), ((1, 4), 1.0), ((1,), -0.5), ((2,), 2.0)])
def test_a_search_wide_enough_finds_the_best_of_all_texts(gpt, stop_ids, penalty):
    tokens, counts, logprobs, scores = searched(gpt, 5**G, stop_ids, penalty)
    for row in range(B):
        expected = exhaustive(gpt, row, stop_ids, penalty)
        num = len(expected)
        np.testing.assert_allclose(scores[row, :num], [x for _, x in expected], atol=BOUND)
        assert texts(tokens[row, :num], counts[row, :num]) == [x for x, _ in expected]
        # There are no others.
        assert np.all(np.isneginf(scores[row, num:])) and not counts[row, num:].any()
        assert np.all(tokens[row, num:] == gpt.package.NO_TOKEN)
    assert np.all(np.isnan(logprobs) == (np.arange(G) >= counts[:, :, None]))
    held = counts > 0
    sums = np.nansum(logprobs, axis=2)[held] / counts[held] ** penalty
    np.testing.assert_allclose(sums, scores[held], rtol=0, atol=BOUND)


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("stop_ids, penalty", [((), 1.0), ((1, 4), 0.7), ((3,), -1.0)])
def test_a_narrow_search_keeps_the_best_of_each_step(gpt, beams, stop_ids, penalty):
    tokens, counts, _, scores = searched(gpt, beams, stop_ids, penalty)
    for row in range(B):
        expected = by_hand(gpt, row, beams, stop_ids, penalty)
        num = len(expected)
        assert texts(tokens[row, :num], counts[row, :num]) == [x for x, _ in expected]
        np.testing.assert_allclose(scores[row, :num], [x for _, x in expected], atol=BOUND)


def test_one_beam_without_stops_is_greedy(gpt):
    tokens = searched(gpt, 1)[0]
    greedy = gpt.package.generate(model_of(gpt), gpt.ints(TOKENS), G, gpt.ints(COUNTS))
    np.testing.assert_array_equal(tokens[:, 0], gpt.numpy(greedy.tokens_BG))


def test_a_prompt_is_searched_as_it_would_be_alone(gpt):
    together = searched(gpt, 3, (1,))
    for row, count in enumerate(COUNTS):
        prompt = gpt.ints(TOKENS[row : row + 1, :count])
        alone = gpt.package.beam_search(model_of(gpt), prompt, 3, G, None, (1,))
        np.testing.assert_array_equal(gpt.numpy(alone.tokens_BRG)[0], together[0][row])


def test_the_twins_find_the_same_beams(twins):
    flax, torch = (searched(gpt, 3, (1,), 0.7) for gpt in twins)
    for name, one, two in zip(("tokens", "counts"), flax, torch, strict=False):
        np.testing.assert_array_equal(one, two, name)
    np.testing.assert_allclose(flax[2], torch[2], rtol=0, atol=BOUND)
    np.testing.assert_allclose(flax[3], torch[3], rtol=0, atol=BOUND)


def test_a_search_ends_when_nothing_live_can_win(gpt, monkeypatch):
    steps, advance = [], gpt.package.Decoder.advance
    monkeypatch.setattr(
        gpt.package.Decoder, "advance", lambda *args: steps.append(1) or advance(*args)
    )
    found = gpt.package.beam_search(
        model_of(gpt), gpt.ints(TOKENS), 2, 9, gpt.ints(COUNTS), range(5), 0.0
    )
    assert not steps  # every id ends a beam
    assert gpt.numpy(found.counts_BR).tolist() == [[1, 1], [1, 1]]
    assert math.isfinite(gpt.numpy(found.scores_BR).sum())


def test_no_beams_and_bad_prompts_are_refused(gpt):
    with pytest.raises(ValueError, match=r"^beam_search: 0 beams. A search keeps at least 1. Ask"):
        searched(gpt, 0)
    with pytest.raises(ValueError, match=r"^beam_search: counts \[9, 1\] are not 2 numbers"):
        gpt.package.beam_search(model_of(gpt), gpt.ints(TOKENS), 2, G, gpt.ints((9, 1)))
