"""Generation against a loop over whole sequences; stops, padding, and what is refused."""

import functools
import re

import jax
import numpy as np
import pytest

B, T, G = 3, 7, 7
COUNTS = (7, 2, 5)
BOUND = 1e-12

# jax compiles a call once per shape, which is faster than dispatching its operations one by one.
CALL = {
    "flax": jax.jit(
        lambda function, *arguments: function(*arguments),
        static_argnums=0,
    ),
    "torch": lambda function, *arguments: function(*arguments),
}


@functools.cache
def model_of(gpt):
    """One model for all tests of a twin, with a seed from which tokens do not repeat at once."""
    return gpt.model(seed=3, init_std=0.7)


@functools.cache
def tokens_of(seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, 61, (B, T))


def forward(model, tokens):
    """Logits of whole sequences."""
    return model(tokens)[0]


def uncached(gpt, tokens):
    """Logits of whole sequences, on the host."""
    return gpt.numpy(CALL[gpt.name](forward, model_of(gpt), gpt.ints(tokens)))


@functools.cache
def by_loop(gpt, seed=0):
    """The G most likely tokens behind each ragged prompt, by the whole sequence every time."""
    rows, chosen = np.zeros((B, T + G), int), np.zeros((B, G), int)
    rows[:, :T] = tokens_of(seed)
    for g in range(G):
        logits = uncached(gpt, rows)
        for b, count in enumerate(COUNTS):
            scores = logits[b, count + g - 1]
            chosen[b, g] = rows[b, count + g] = np.argmax(scores)
            assert np.diff(np.sort(scores)[-2:])[0] > 1e-6  # so equal tokens are no accident
    assert len(np.unique(chosen)) > 10
    return chosen


def generated(gpt, tokens=None, num=G, counts=COUNTS, **options):
    """Tokens and counts of `generate`, on the host."""
    tokens = tokens_of() if tokens is None else tokens
    counts = None if counts is None else gpt.ints(counts)
    generation = gpt.package.generate(model_of(gpt), gpt.ints(tokens), num, counts, **options)
    return gpt.numpy(generation.tokens_BG), gpt.numpy(generation.counts_B)


def ended(gpt, tokens, stops):
    """Rows cut behind their first stop, and how much is left of each."""
    cut = np.full_like(tokens, gpt.package.NO_TOKEN)
    counts = []
    for b, row in enumerate(tokens):
        hits = np.flatnonzero(np.isin(row, stops))
        counts.append(hits[0] + 1 if len(hits) else len(row))
        cut[b, : counts[-1]] = row[: counts[-1]]
    return cut, counts


# --- generate ---


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_takes_the_most_likely_token_again_and_again(gpt, use_cache):
    tokens, counts = generated(gpt, use_cache=use_cache)
    np.testing.assert_array_equal(tokens, by_loop(gpt))
    np.testing.assert_array_equal(counts, [G] * B)


def test_the_twins_generate_the_same_tokens(twins):
    flax, torch_tokens = (generated(gpt)[0] for gpt in twins)
    np.testing.assert_array_equal(flax, torch_tokens)


def test_a_row_generates_what_it_would_alone(gpt):
    expected = by_loop(gpt)
    for b, count in enumerate(COUNTS):
        alone, _ = generated(gpt, tokens_of()[b : b + 1, :count], counts=None)
        np.testing.assert_array_equal(alone, expected[b : b + 1])


def test_without_counts_a_prompt_is_as_long_as_the_array(gpt):
    found, _ = generated(gpt, counts=None)
    np.testing.assert_array_equal(found, generated(gpt, counts=[T] * B)[0])
    assert not np.array_equal(found, by_loop(gpt))


def test_the_content_of_padding_does_not_change_what_is_generated(gpt):
    padded = np.arange(T) >= np.array(COUNTS)[:, None]
    for padding in (-1, 61 + 5):
        tokens, _ = generated(gpt, np.where(padded, padding, tokens_of()))
        np.testing.assert_array_equal(tokens, by_loop(gpt))


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_may_be_wider_than_the_context(gpt, use_cache):
    wide = np.pad(tokens_of(), ((0, 0), (0, model_of(gpt).config.context_length)))
    tokens, _ = generated(gpt, wide, use_cache=use_cache)
    np.testing.assert_array_equal(tokens, by_loop(gpt))


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_may_fill_the_context_to_its_end(gpt, use_cache):
    num = model_of(gpt).config.context_length - T
    tokens, counts = generated(gpt, num=num, use_cache=use_cache)
    np.testing.assert_array_equal(tokens[:, :G], by_loop(gpt))
    np.testing.assert_array_equal(counts, [num] * B)
    assert (tokens >= 0).all()


def test_one_new_token_needs_no_step(gpt):
    tokens, counts = generated(gpt, num=1)
    np.testing.assert_array_equal(tokens, by_loop(gpt)[:, :1])
    np.testing.assert_array_equal(counts, [1] * B)


def test_ties_go_to_the_lowest_id(gpt):
    zeros = gpt.package.GPT(model_of(gpt).config)  # all logits are equal
    generation = gpt.package.generate(zeros, gpt.ints(tokens_of()), G, gpt.ints(COUNTS))
    assert not gpt.numpy(generation.tokens_BG).any()


def test_a_float32_model_generates_under_strict_promotion(gpt):
    found = []
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        model = gpt.model(seed=3, init_std=0.7, dtype="float32", num_layers=1)
        for use_cache in (True, False):
            generation = gpt.package.generate(
                *(model, gpt.ints(tokens_of()), 3, gpt.ints(COUNTS), [5], use_cache),
                gpt.package.Sampling(top_k=20, top_p=0.9, min_p=0.02),  # greedy is a part of it
                gpt.random.key(0),
            )
            found.append(gpt.numpy(generation.tokens_BG))
    np.testing.assert_array_equal(*found)


# --- stops ---


def stops_of(tokens):
    """An id that ends one row in the middle, an id that is a row's first, and one that never comes.

    Of those that come, none is in every row.
    """
    inner = next(x for x in tokens[0, 2:-1] if x not in tokens[1] and x not in tokens[0, :2])
    absent = next(x for x in range(61) if x not in tokens)
    return int(inner), int(tokens[1, 0]), absent


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("which", [(0, 2), (1, 2), (2, 2), (0, 1)])
def test_a_row_ends_behind_its_first_stop_and_the_others_go_on(gpt, which, use_cache):
    free = by_loop(gpt)
    stops = [stops_of(free)[i] for i in which]
    expected, expected_counts = ended(gpt, free, stops)
    assert (expected == free).all() == (which == (2, 2))  # the stop does stop something
    tokens, counts = generated(gpt, stop_ids=stops, use_cache=use_cache)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(counts, expected_counts)


def test_the_call_ends_when_every_row_has_ended(gpt, monkeypatch):
    hidden, calls = gpt.package.GPT.hidden, []
    note = jax.debug.callback if gpt.name == "flax" else lambda function, *values: function(*values)

    def noting(*arguments):
        note(calls.append, 1)
        return hidden(*arguments)

    monkeypatch.setattr(gpt.package.GPT, "hidden", noting)
    # A width of its own, for which jax has no program yet and will need none after this.
    model = gpt.model(seed=3, init_std=0.7, mlp_dim=29)

    def run(stop_ids):
        calls.clear()
        generation = gpt.package.generate(
            model, gpt.ints(tokens_of()), G, gpt.ints(COUNTS), stop_ids
        )
        found = gpt.numpy(generation.tokens_BG), gpt.numpy(generation.counts_B).tolist()
        jax.effects_barrier()
        return *found, len(calls)

    free, _, turns = run([-5] * B)
    assert turns == G
    stops = free[:, 2].tolist()
    expected, expected_counts = ended(gpt, free, stops)
    tokens, counts, turns = run(stops)
    np.testing.assert_array_equal(tokens, expected)
    assert counts == expected_counts
    assert turns == max(counts) < G


# --- one compiled program per shape ---


def test_prompts_of_other_lengths_run_the_program_that_is_there(twins):
    flax, _ = twins
    generated(flax, stop_ids=(5,))
    programs = flax.package.Decoder.num_compilations()
    for width in (5, 6, 7, 8):  # all rounded up to 8
        tokens = np.random.default_rng(width).integers(0, 61, (B, width))
        for counts in ((1, 2, 3), (4, 4, 1), None):
            generated(flax, tokens, counts=counts)
    generated(flax, tokens, num=G - 1)
    generated(flax, tokens, stop_ids=(7,))
    assert flax.package.Decoder.num_compilations() == programs
    generated(flax, np.resize(tokens, (B + 2, 8)), counts=None)
    assert flax.package.Decoder.num_compilations() == programs + 2  # the count does count


# --- refusals ---


@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 0), (2, 3, 7)])
def test_a_batch_without_a_prompt_is_refused(gpt, shape):
    message = f"generate: prompts of shape {shape}. A prompt is at least one token, and a batch is"
    with pytest.raises(ValueError, match=re.escape(message)):
        gpt.package.generate(model_of(gpt), gpt.ints(np.zeros(shape)), G)


REFUSED = [
    (dict(num=0), "0 new tokens are fewer than 1"),
    (dict(counts=(7, 0, 5)), "counts [7, 0, 5] are not 3 numbers from 1 to 7"),
    (dict(counts=(7, 8, 5)), "counts [7, 8, 5] are not 3 numbers from 1 to 7"),
    (dict(counts=(7, 2)), "counts [7, 2] are not 3 numbers from 1 to 7"),
    (dict(tokens=[[3, 61], [5, 2]], counts=None), "ids 2 to 61 are not all in [0, 61)"),
    (dict(tokens=[[3, 4], [-1, 2]], counts=None), "ids -1 to 4 are not all in [0, 61)"),
    (
        dict(num=23),
        "7 prompt tokens + 23 new tokens = 30 > context_length 29; ask for at most 22",
    ),
    (
        dict(num=-2, counts=(9, 9, 9)),
        "-2 new tokens are fewer than 1; counts [9, 9, 9] are not 3 numbers from 1 to 7",
    ),
    (
        dict(tokens=[[3, 99], [5, 2]], counts=(2, 1), num=28),
        "ids 3 to 99 are not all in [0, 61); "
        "2 prompt tokens + 28 new tokens = 30 > context_length 29; ask for at most 27",
    ),
]


@pytest.mark.parametrize("request_, message", REFUSED)
def test_a_request_that_cannot_be_met_is_refused_with_all_its_problems(gpt, request_, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'generate: {message}.')}$"):
        generated(gpt, **request_)


def test_a_prompt_as_long_as_the_context_leaves_room_for_nothing(gpt):
    tokens = np.zeros((1, 31))
    with pytest.raises(ValueError, match=r"31 prompt tokens .* ask for at most 0"):
        generated(gpt, tokens, counts=None, num=1)


# --- padding on the left ---


def left_padded(padding=0):
    """The ragged prompts with their padding in front, and the mask that says so."""
    tokens, mask = np.full((B, T), padding), np.zeros((B, T), int)
    for b, count in enumerate(COUNTS):
        tokens[b, T - count :] = tokens_of()[b, :count]
        mask[b, T - count :] = 1
    return tokens, mask


def test_left_padded_prompts_generate_what_right_padded_ones_do(gpt):
    tokens, mask = left_padded(padding=17)
    rows, counts = gpt.package.right_pad(gpt.ints(tokens), gpt.ints(mask))
    np.testing.assert_array_equal(gpt.numpy(counts), COUNTS)
    found, _ = generated(gpt, gpt.numpy(rows), counts=gpt.numpy(counts))
    np.testing.assert_array_equal(found, by_loop(gpt))


def test_tokens_keep_their_order_when_padding_moves(gpt):
    tokens = [[0, 0, 4, 5, 6], [7, 8, 0, 0, 0], [0, 9, 3, 2, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]]
    mask = [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    rows, counts = gpt.package.right_pad(gpt.ints(tokens), gpt.ints(mask))
    np.testing.assert_array_equal(
        gpt.numpy(rows),
        [[4, 5, 6, 0, 0], [7, 8, 0, 0, 0], [9, 3, 2, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]],
    )
    np.testing.assert_array_equal(gpt.numpy(counts), [3, 2, 3, 5, 0])


def test_long_rows_keep_their_order_too(gpt):
    # Sorting algorithms keep short rows in order even where they promise nothing.
    width = 101
    tokens = np.arange(B * width).reshape(B, width)
    mask = (np.arange(width) >= 20) & (np.arange(width) < 90) & np.ones((B, 1), bool)
    rows, _ = gpt.package.right_pad(gpt.ints(tokens), gpt.ints(mask))
    np.testing.assert_array_equal(gpt.numpy(rows)[:, :70], tokens[:, 20:90])


def test_padding_between_tokens_is_refused(gpt):
    mask = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    with pytest.raises(
        ValueError, match=r"right_pad: row 2 has padding between its tokens. A row is"
    ):
        gpt.package.right_pad(gpt.ints(np.ones((3, 4))), gpt.ints(mask))
