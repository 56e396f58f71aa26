"""Drawn tokens: the filters, the law of the draws, and one stream of noise for every call."""

import dataclasses
import functools
import re

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from flax_gpt import GREEDY, Sampling

B, T, G, V = 3, 7, 7, 61
COUNTS = (2, 7, 5)
SEEDS = range(20)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

SETTINGS = {
    "greedy": GREEDY,
    "temperature": Sampling(temperature=0.8),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.7),
    "min-p": Sampling(min_p=0.05),
    "all": Sampling(temperature=1.7, top_k=20, top_p=0.9, min_p=0.02),
}
SETTING = pytest.mark.parametrize("setting", SETTINGS)

# jax compiles a call once per shape, which is faster than dispatching its operations one by one.
CALL = {
    "flax": jax.jit(
        lambda function, *arguments: function(*arguments),
        static_argnums=0,
    ),
    "torch": lambda function, *arguments: function(*arguments),
}

# The fixture only turns 64-bit types on, so every example may share it.
examples = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=60
)


# --- what is left of the logits ---


def by_hand(logits, sampling):
    """One row's logits in float64, -inf where dropped: the filters one after the other, each on
    probabilities that add up to 1 again. And how near the nearest token was to its filter's edge.
    """
    logits = np.asarray(logits, "float64")
    logits = (logits - logits.max()) / sampling.temperature
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k]
    edges = [1.0]

    def shares():
        weights = np.exp(logits[kept])
        return weights / weights.sum()

    if sampling.top_p < 1.0:
        found, num = shares(), 1
        while num < len(kept) and found[:num].sum() < sampling.top_p:
            num += 1
        edges += [abs(found[:i].sum() - sampling.top_p) for i in range(1, len(kept))]
        kept = kept[:num]
    if sampling.min_p > 0.0:
        found = shares()
        edges += [abs(x / found[0] - sampling.min_p) for x in found if x < found[0]]
        kept = [i for i, x in zip(kept, found, strict=True) if x >= sampling.min_p * found[0]]
    result = np.full(len(logits), -np.inf)
    result[kept] = logits[kept]
    return result, min(edges)


def filtered(gpt, logits, sampling):
    """`filter_logits` on the host."""
    return gpt.numpy(gpt.package.filter_logits(gpt.floats(logits), sampling))


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-12)])
@examples
@hypothesis.given(
    # Quarters, so that there are ties.
    quarters=hypothesis.extra.numpy.arrays("int64", (4, 13), elements=st.integers(-20, 20)),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.1, 4.0),
        top_k=st.sampled_from([None, 1, 4, 99]),  # few, because jax compiles each
        top_p=st.floats(1e-3, 1.0),
        min_p=st.one_of(st.just(0.0), st.floats(1e-3, 1.0)),
    ),
)
def test_the_filters_keep_what_they_promise_one_after_the_other(
    gpt, dtype, bound, quarters, sampling
):
    logits = (quarters / 4).astype(dtype)
    expected, edges = zip(*(by_hand(row, sampling) for row in logits), strict=True)
    hypothesis.assume(min(edges) > bound)
    found = filtered(gpt, logits, sampling)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, rtol=4 * np.finfo(dtype).eps, atol=0)


WARPERS = [
    Sampling(temperature=0.3),
    Sampling(top_k=9),
    Sampling(top_k=1000),
    Sampling(top_p=0.05),
    Sampling(top_p=0.95),
    Sampling(min_p=0.1),
    Sampling(min_p=1.0),
    Sampling(temperature=1.9, top_k=9, top_p=0.6, min_p=0.2),
    Sampling(temperature=2.5, top_k=9, top_p=0.999, min_p=0.01),
    Sampling(temperature=2.5, top_k=None, top_p=0.95, min_p=0.05),
]


@pytest.mark.parametrize("sampling", WARPERS, ids=str)
def test_the_filters_are_those_of_hugging_face(gpt, sampling):
    logits = np.random.default_rng(0).normal(0.0, 2.0, (17, V)) - 90.0
    theirs = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(sampling.temperature)]
        + ([transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else [])
        + [transformers.TopPLogitsWarper(sampling.top_p)]
        + [transformers.MinPLogitsWarper(sampling.min_p)]
    )
    expected = theirs(None, torch.from_numpy(logits)).softmax(-1).numpy()
    found = torch.from_numpy(np.array(filtered(gpt, logits, sampling))).softmax(-1).numpy()
    np.testing.assert_array_equal(found > 0.0, expected > 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@DTYPES
def test_the_sum_that_just_reaches_p_is_enough_as_in_hugging_face(gpt, dtype):
    logits = np.zeros((1, 8), dtype)  # probabilities of 1 / 8, whose sums are exact
    for p, num in ((0.125, 1), (0.25, 2), (0.5, 4), (0.501, 5), (0.875, 7), (0.876, 8)):
        found = np.flatnonzero(np.isfinite(filtered(gpt, logits, Sampling(top_p=p))))
        theirs = transformers.TopPLogitsWarper(p)(None, torch.from_numpy(logits))
        assert found.tolist() == list(range(num))
        assert theirs.isfinite().sum() == num


@pytest.mark.parametrize("sampling", [Sampling(top_k=9), Sampling(top_p=0.03)], ids=str)
def test_of_equal_logits_the_lower_ids_are_kept(gpt, sampling):
    # So many that no sorting algorithm keeps their order by chance; 0.0 equals -0.0.
    logits = np.random.default_rng(0).choice([0.0, -0.0, -1.0], (5, 301))
    for row, found in zip(logits, filtered(gpt, logits, sampling), strict=True):
        kept = np.flatnonzero(np.isfinite(found))
        assert 3 < len(kept) < 20
        np.testing.assert_array_equal(kept, np.flatnonzero(row == 0.0)[: len(kept)])


def test_min_p_keeps_all_that_are_as_likely_as_the_first(gpt):
    logits = np.array([[1.0, 3.0, 2.0, 3.0, 3.0]])
    found = filtered(gpt, logits, Sampling(min_p=1.0))
    np.testing.assert_array_equal(found, [[-np.inf, 0.0, -np.inf, 0.0, 0.0]])


def test_a_vocabulary_of_one_is_never_empty(gpt):
    for sampling in SETTINGS.values():
        if sampling.temperature > 0.0:
            assert filtered(gpt, np.array([[-3.0], [2.0]]), sampling).tolist() == [[0.0], [0.0]]


@DTYPES
def test_no_temperature_is_too_low_or_too_high(gpt, dtype):
    logits = np.array([[-5.0, -4.0, -4.5], [50.0, 0.0, 49.0]], dtype)
    for temperature in (5e-324, 1e-300, 1e-40):
        found = filtered(gpt, logits, Sampling(temperature=temperature, top_p=0.5))
        np.testing.assert_array_equal(found == 0.0, logits == logits.max(axis=1, keepdims=True))
        assert (found[found != 0.0] == -np.inf).all()
    for temperature in (1e40, 1e300):
        found = filtered(gpt, logits, Sampling(temperature=temperature, top_p=0.5))
        np.testing.assert_array_equal(np.isfinite(found).sum(axis=1), [2, 2])
        assert np.abs(found[np.isfinite(found)]).max() < 1e-30


def test_logits_of_16_bits_are_filtered_in_32(gpt):
    logits = np.random.default_rng(0).normal(0.0, 2.0, (3, V)).astype(ml_dtypes.bfloat16)
    wide, sampling = logits.astype("float32"), SETTINGS["all"]
    narrow = jnp.asarray(logits) if gpt.name == "flax" else torch.from_numpy(wide).bfloat16()
    found = gpt.numpy(gpt.package.filter_logits(narrow, sampling))
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, filtered(gpt, wide, sampling))


# --- generate ---


@functools.cache
def model_of(gpt, dtype="float64"):
    """One model for all tests of a twin, with a seed from which tokens do not repeat at once."""
    return gpt.model(seed=3, init_std=0.7, num_layers=1, dtype=dtype)


@functools.cache
def tokens_of(seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, V, (B, T))


def generated(gpt, setting, seed=0, tokens=None, counts=COUNTS, num=G, model=None, **options):
    """Tokens, counts and margins of `generate`, on the host."""
    sampling = SETTINGS[setting] if isinstance(setting, str) else setting
    tokens = tokens_of() if tokens is None else tokens
    counts = None if counts is None else gpt.ints(counts)
    key = None if seed is None else gpt.random.key(seed)
    generation = gpt.package.generate(
        model_of(gpt) if model is None else model,
        *(gpt.ints(tokens), num, counts),
        sampling=sampling,
        key=key,
        **options,
    )
    return tuple(
        gpt.numpy(array)
        for array in (generation.tokens_BG, generation.counts_B, generation.margins_BG)
    )


def forward(model, tokens):
    """Logits of whole sequences."""
    return model(tokens)[0]


def by_loop(gpt, setting, seed):
    """Tokens and margins from whole sequences, filters by hand and the noise of `jax.random`."""
    sampling, key = SETTINGS[setting], jax.random.key(seed)
    rows, chosen, margins = np.zeros((B, T + G), int), np.zeros((B, G), int), np.zeros((B, G))
    rows[:, :T] = tokens_of()
    for g in range(G):
        logits = gpt.numpy(CALL[gpt.name](forward, model_of(gpt), gpt.ints(rows)))
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, g), (B, V), "float32"))
        for b, count in enumerate(COUNTS):
            scores = logits[b, count + g - 1]
            if sampling.temperature > 0.0:
                scores = by_hand(scores, sampling)[0] + noise[b]
            chosen[b, g] = rows[b, count + g] = np.argmax(scores)
            second, first = np.sort(scores)[-2:]
            margins[b, g] = first - second
    assert margins.min() > 1e-4  # so equal tokens are no accident
    return chosen, margins


@SETTING
def test_tokens_and_margins_are_those_of_whole_sequences(gpt, setting):
    for seed in (0, 1):
        expected, margins = by_loop(gpt, setting, seed)
        found, counts, found_margins = generated(gpt, setting, seed)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(counts, [G] * B)
        # In drawing, the noise has float32's rounding.
        bound = 1e-12 if setting == "greedy" else 1e-5
        np.testing.assert_allclose(found_margins, margins, rtol=0, atol=bound)
        assert found_margins.dtype == "float64"


@pytest.mark.parametrize(
    "dtype, setting",
    [("float64", setting) for setting in SETTINGS]
    + [("float32", setting) for setting in ("temperature", "all")],
)
def test_the_twins_draw_the_same_tokens(twins, dtype, setting):
    drawn = set()
    for seed in SEEDS:
        (ours, _, margins), (theirs, _, their_margins) = (
            generated(gpt, setting, seed, tokens_of(seed), model=model_of(gpt, dtype))
            for gpt in twins
        )
        np.testing.assert_array_equal(ours, theirs)
        assert margins.dtype == their_margins.dtype == dtype
        bound = {"float32": 2e-4, "float64": 1e-5}[dtype]
        np.testing.assert_allclose(margins, their_margins, rtol=0, atol=bound)
        drawn.add(ours.tobytes())
    assert len(drawn) == len(SEEDS)


def in_float64(gpt, model):
    """A float64 model with the weights of a float32 one."""
    wide = gpt.package.GPT(dataclasses.replace(model.config, dtype="float64"))
    if gpt.name == "torch":
        wide.load_state_dict(model.state_dict())
    else:
        nnx.update(wide, jax.tree.map(lambda x: x.astype("float64"), nnx.state(model)))
    return wide


def test_a_seed_draws_the_same_tokens_in_every_dtype(gpt):
    narrow = model_of(gpt, "float32")
    models = narrow, in_float64(gpt, narrow)
    for seed in SEEDS:
        found, expected = (generated(gpt, "all", seed, model=model)[0] for model in models)
        np.testing.assert_array_equal(found, expected)


def test_the_cache_does_not_change_what_is_drawn(gpt):
    for seed in SEEDS:
        tokens, counts, margins = generated(gpt, "all", seed)
        others = generated(gpt, "all", seed, use_cache=False)
        np.testing.assert_array_equal(tokens, others[0])
        np.testing.assert_array_equal(counts, others[1])
        np.testing.assert_allclose(margins, others[2], rtol=0, atol=1e-5)


def test_a_row_alone_and_without_padding_draws_the_same(gpt):
    for seed in SEEDS:
        expected, _, _ = generated(gpt, "all", seed)
        alone, _, _ = generated(gpt, "all", seed, tokens_of()[:1, : COUNTS[0]], counts=None)
        np.testing.assert_array_equal(alone, expected[:1])


def test_equal_rows_draw_different_tokens(gpt):
    same = np.repeat(tokens_of()[:1], B, axis=0)
    found, _, _ = generated(gpt, "all", tokens=same, counts=[T] * B)
    assert len({row.tobytes() for row in found}) == B
    assert len(np.unique(found[:, 0])) > 1  # already in the first token


def test_a_key_draws_the_same_again_and_another_key_something_else(gpt):
    key = gpt.random.key(5)
    before = gpt.numpy(key).copy()
    first, second, other = (
        generated(gpt, "temperature", seed, tokens_of(7))[0] for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).mean() > 0.5
    np.testing.assert_array_equal(gpt.numpy(key), before)


def test_tokens_follow_the_filtered_probabilities_each_given_those_before(gpt):
    num, vocab, prompt = 20_011, 5, 2
    sampling = Sampling(temperature=1.5, top_p=0.95)
    model = gpt.model(seed=2, init_std=0.7, num_layers=1, vocab_size=vocab)

    def shares(tokens):
        logits = gpt.numpy(CALL[gpt.name](forward, model, gpt.ints(tokens)))[:, -1]
        weights = np.exp([by_hand(row, sampling)[0] for row in logits])
        return weights / weights.sum(axis=1, keepdims=True)

    first = shares([[prompt]])[0]
    then = shares([[prompt, token] for token in range(vocab)])
    expected = first[:, None] * then
    assert (expected == 0.0).any() and np.sort(expected.ravel())[-5] > 0.05  # not one alone
    tokens, _, _ = generated(
        gpt, sampling, tokens=np.full((num, 1), prompt), counts=None, num=2, model=model
    )
    found = np.zeros((vocab, vocab))
    np.add.at(found, tuple(tokens.T), 1.0)
    error = np.abs(found / num - expected)
    assert (error <= 5 * np.sqrt(expected * (1.0 - expected) / num)).all()


# --- where sampling ends in taking the first ---


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-9), Sampling(top_k=1)], ids=str)
def test_a_low_temperature_and_a_single_token_are_greedy(gpt, sampling):
    expected, _, margins = generated(gpt, "greedy", seed=None)
    for seed in (0, 1):
        found, _, found_margins = generated(gpt, sampling, seed)
        np.testing.assert_array_equal(found, expected)
        assert (found_margins > 1e4 * margins).all()
        assert (found_margins == np.inf).all() == (sampling.top_k == 1)


def test_temperature_zero_needs_no_key_and_no_program_of_its_own(gpt):
    expected, _, margins = generated(gpt, "greedy", seed=None)
    programs = gpt.package.Decoder.num_compilations()
    for seed in (None, 0):
        sampling = Sampling(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9)
        found, _, found_margins = generated(gpt, sampling, seed)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_margins, margins)
    assert gpt.package.Decoder.num_compilations() == programs


# --- stops ---


def test_a_row_ends_behind_a_drawn_stop_and_the_others_go_on(gpt):
    free, _, margins = generated(gpt, "all")
    stop = next(int(x) for x in free[0, 2:-1] if x not in free[1:] and x not in free[0, :2])
    tokens, counts, found_margins = generated(gpt, "all", stop_ids=[stop])
    end = free[0].tolist().index(stop) + 1
    assert counts.tolist() == [end, G, G] and end < G
    behind = np.arange(G) >= counts[:, None]
    np.testing.assert_array_equal(tokens, np.where(behind, gpt.package.NO_TOKEN, free))
    np.testing.assert_array_equal(np.isnan(found_margins), behind)
    np.testing.assert_allclose(found_margins[~behind], margins[~behind], rtol=0, atol=1e-5)


# --- dtypes and refusals ---


def test_a_model_of_16_bits_is_scored_in_32(gpt):
    # Of two logits one is soon negative, and then 16 bits cannot hold how far they are apart.
    model = gpt.model(seed=3, init_std=0.7, num_layers=1, vocab_size=2, dtype="bfloat16")
    _, _, margins = generated(gpt, "greedy", seed=None, tokens=tokens_of() % 2, model=model)
    assert margins.dtype == "float32" and (margins >= 0.0).all()
    assert (margins.astype(ml_dtypes.bfloat16) != margins).any()


@pytest.mark.parametrize("num, others", [(G, ""), (0, "0 new tokens are fewer than 1; ")])
def test_drawing_without_a_key_is_refused_with_all_other_problems(gpt, num, others):
    message = (
        f"generate: {others}temperature 0.8 and no key to draw with; give one or take temperature "
        "0."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generated(gpt, "temperature", seed=None, num=num)
