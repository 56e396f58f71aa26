"""Speculation writes what plain decoding writes, whoever guesses and however wrong the guesses."""

import functools

import numpy as np
import pytest

B, T, G = 3, 7, 14
COUNTS = (7, 2, 5)
TOKENS = np.random.default_rng(0).integers(0, 61, (B, T))


@functools.cache
def model_of(gpt, seed=3, **changes):
    """A model, loud enough not to repeat one token, or a small one that guesses badly."""
    return gpt.model(seed=seed, init_std=0.7, **changes)


class Oracle:
    """Guesses that are right up to a place of each call, which moves."""

    num_tokens = 4

    def __init__(self, package, tokens):
        self._package, self._tokens, self._calls = package, tokens, 0

    def start(self, tokens, counts, capacity):
        self._counts = counts

    def guess(self, text, lengths, key, sampling):
        self._calls += 1
        guesses = np.zeros((B, 4), np.int32)
        for row in range(B):
            new = self._tokens[row, lengths[row] - self._counts[row] :][:4]
            guesses[row, : len(new)] = new
            guesses[row, (self._calls + row) % 5 :] += 1  # wrong from there on
        return self._package.Guesses(guesses % 61, np.full(B, 4))

    def keep(self, lengths):
        pass


def drafts_of(gpt, tokens):
    """Every way to guess."""
    package = gpt.package
    return {
        "lookup": package.PromptLookup(3),
        "itself": package.DraftModel(model_of(gpt), 4),
        "another": package.DraftModel(model_of(gpt, seed=5, num_layers=1), 3),
        "oracle": Oracle(gpt.package.decoding.speculation, tokens),
    }


def plain(gpt, stop_ids=(), model=None):
    """Tokens, counts and margins of `generate`."""
    model = model or model_of(gpt)
    found = gpt.package.generate(model, gpt.ints(TOKENS), G, gpt.ints(COUNTS), stop_ids)
    return [gpt.numpy(x) for x in (found.tokens_BG, found.counts_B, found.margins_BG)]


def spoken(gpt, draft, stop_ids=(), model=None, **options):
    """What `speculate` writes."""
    model = model or model_of(gpt)
    arguments = gpt.ints(TOKENS), G, draft, gpt.ints(COUNTS), stop_ids
    return gpt.package.speculate(model, *arguments, **options)


@pytest.mark.parametrize("who", ["lookup", "itself", "another", "oracle"])
def test_greedy_tokens_are_those_of_plain_decoding(gpt, who):
    tokens = plain(gpt)[0]
    stops = [int(tokens[0, 5]), int(tokens[1, 2])]
    for stop_ids in ((), stops):
        expected, counts, margins = plain(gpt, stop_ids)
        found = spoken(gpt, drafts_of(gpt, tokens)[who], stop_ids)
        np.testing.assert_array_equal(found.tokens_BG, expected)
        np.testing.assert_array_equal(found.counts_B, counts)
        np.testing.assert_allclose(found.margins_BG, margins, rtol=0, atol=1e-11)
        assert np.all(found.accepted_P <= found.guessed_P)
        if who == "itself":  # right each time, so the draft's cache is never behind
            assert found.accepted_P.tolist() == found.guessed_P.tolist()
            assert found.tokens_per_call >= (4.0 if not stop_ids else 1.0)
        if who == "oracle" and not stop_ids:
            assert found.guessed_P.min() > found.accepted_P.min() > 0


def test_a_text_that_repeats_is_looked_up(gpt):
    lookup = gpt.package.PromptLookup(4, longest=2)
    text = np.array([[1, 2, 3, 4, 5, 2, 3, 0], [7, 8, 9, 1, 2, 3, 4, 5], [6, 6, 6, 6, 0, 0, 0, 0]])
    found = lookup.guess(text, np.array((7, 8, 4)), None, gpt.package.GREEDY)
    assert found.counts_B.tolist() == [4, 0, 1]  # never the ending itself
    assert found.tokens_BP.tolist() == [[4, 5, 2, 3], [0] * 4, [6, 0, 0, 0]]


def test_the_bits_are_those_of_plain_decoding_where_a_batch_rounds_nothing(gpt):
    model = model_of(gpt, dtype="float32", num_layers=1)
    decoder = gpt.package.BatchInvariantDecoder(model, B)
    expected, _, margins = plain(gpt, model=decoder)
    found = spoken(gpt, Oracle(gpt.package.decoding.speculation, expected), model=decoder)
    np.testing.assert_array_equal(found.tokens_BG, expected)
    np.testing.assert_array_equal(found.margins_BG.astype(margins.dtype), margins)
    assert found.accepted_P.any() and (found.accepted_P < found.guessed_P).any()


def test_the_rejection_rule_keeps_the_distribution(gpt, rng):
    wanted, guessed = rng.dirichlet(np.ones(9), (2, 40))
    wanted[3, 2:5] = guessed[5, 4:8] = 0.0  # a filter has dropped some
    guessed[7], guessed[8] = wanted[7], np.eye(9)[4]
    wanted, guessed = (x / x.sum(1, keepdims=True) for x in (wanted, guessed))
    accept, instead = map(
        gpt.numpy, gpt.package.rejection_rule(*map(gpt.floats, (wanted, guessed)))
    )
    kept = guessed * accept
    refused = 1.0 - kept.sum(1, keepdims=True)
    np.testing.assert_allclose(kept + refused * instead, wanted, rtol=0, atol=1e-15)
    assert accept.min() >= 0.0 and accept.max() <= 1.0


@pytest.mark.parametrize("who", ["lookup", "itself", "another"])
def test_drawn_tokens_are_accepted_by_that_rule(gpt, who):
    sampling, key = gpt.package.Sampling(temperature=0.7, top_k=20), gpt.random.key(4)
    draft = drafts_of(gpt, None)[who]
    found = spoken(gpt, draft, sampling=sampling, key=key)
    again = spoken(gpt, draft, sampling=sampling, key=key)
    np.testing.assert_array_equal(found.tokens_BG, again.tokens_BG)
    assert np.all((found.tokens_BG >= 0) & (found.tokens_BG < 61))
    if who == "itself":  # guesses come from the distribution that is wanted
        assert found.accepted_P.tolist() == found.guessed_P.tolist()


def test_the_twins_draw_the_same(twins):
    drawn = [
        spoken(
            gpt,
            drafts_of(gpt, None)["another"],
            sampling=gpt.package.Sampling(temperature=0.9),
            key=gpt.random.key(2),
        )
        for gpt in twins
    ]
    np.testing.assert_array_equal(drawn[0].tokens_BG, drawn[1].tokens_BG)
    assert drawn[0].accepted_P.tolist() == drawn[1].accepted_P.tolist()


@pytest.mark.parametrize("who", ["lookup", "itself"])
def test_a_text_may_fill_the_context(gpt, who):
    num = model_of(gpt).config.context_length - T
    greedy = gpt.package.generate(model_of(gpt), gpt.ints(TOKENS), num)
    found = gpt.package.speculate(model_of(gpt), gpt.ints(TOKENS), num, drafts_of(gpt, None)[who])
    np.testing.assert_array_equal(found.tokens_BG, gpt.numpy(greedy.tokens_BG))


def test_a_request_that_cannot_be_met_is_refused(gpt):
    with pytest.raises(ValueError, match=r"^speculate: 0 new tokens are fewer than 1"):
        gpt.package.speculate(model_of(gpt), gpt.ints(TOKENS), 0, gpt.package.PromptLookup())
