"""The two classifiers: what they read, what they do not, and that both twins learn the same."""

import functools

import jax
import numpy as np
import pytest
import torch

B, T, C, V = 6, 9, 3, 61
COUNTS = np.array((9, 4, 0, 1, 7, 5))
BOUND = 1e-12
KINDS = {
    "token": ("TokenClassifier", "TOKEN_CLASS"),
    "sequence": ("SequenceClassifier", "SEQUENCE_CLASS"),
}


def classifier(gpt, kind, **changes):
    """A small classifier."""
    sizes = dict(num_layers=1, init_std=0.3) | changes
    make = getattr(gpt.package, KINDS[kind][0])
    return make(gpt.config(**sizes), C, gpt.random.key(1))


def task_of(gpt, kind):
    """What it is trained to predict."""
    return getattr(gpt.package, KINDS[kind][1])


def tokens_of(seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, V, (B, T))


@functools.cache
def scorer(gpt, kind):
    """A classifier as a function, compiled where that can be."""
    model = classifier(gpt, kind)
    return jax.jit(lambda *arrays: model(*arrays)) if gpt.name == "flax" else model


@functools.cache
def scores(gpt, kind, padding=0):
    """A classifier's scores for ragged rows."""
    tokens = np.where(np.arange(T) < COUNTS[:, None], tokens_of(), padding)
    return gpt.numpy(scorer(gpt, kind)(gpt.ints(tokens), gpt.ints(COUNTS)))


def mean_over_tokens(gpt, x, counts=None):
    """The twin's mean of an array from the host."""
    counts = None if counts is None else gpt.ints(counts)
    return gpt.numpy(gpt.package.training.classifier.mean_over_tokens(gpt.floats(x), counts))


# --- the mean ---


def test_the_mean_is_the_one_over_each_rows_real_tokens(gpt, rng):
    x = rng.normal(size=(B, T, 5))
    expected = [x[b, :n].mean(axis=0) if n else np.zeros(5) for b, n in enumerate(COUNTS)]
    np.testing.assert_allclose(mean_over_tokens(gpt, x, COUNTS), expected, rtol=0, atol=BOUND)
    np.testing.assert_allclose(mean_over_tokens(gpt, x), x.mean(axis=1), rtol=0, atol=BOUND)
    full = mean_over_tokens(gpt, x, np.full(B, T))
    np.testing.assert_allclose(full, mean_over_tokens(gpt, x), rtol=0, atol=BOUND)
    assert np.abs(full - mean_over_tokens(gpt, x, COUNTS)).max() > 0.1


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e300])
def test_no_padding_reaches_the_mean(gpt, rng, poison):
    x = rng.normal(size=(B, T, 5))
    padded = np.arange(T) >= COUNTS[:, None]
    poisoned = np.where(padded[:, :, None], poison, x)
    found = mean_over_tokens(gpt, poisoned, COUNTS)
    np.testing.assert_array_equal(found, mean_over_tokens(gpt, x, COUNTS))
    assert not found[2].any()  # the row that has none


def test_the_mean_of_16_bit_numbers_is_added_up_in_float32(gpt):
    # In bfloat16 256 + 1 is 256, so adding one after the other would end there.
    ones = np.ones((1, 1000, 1), "float32")
    x = gpt.floats(ones)
    x = x.astype("bfloat16") if gpt.name == "flax" else x.bfloat16()
    for counts in (None, gpt.ints([1000])):
        found = gpt.package.training.classifier.mean_over_tokens(x, counts)
        assert str(found.dtype).removeprefix("torch.") == "bfloat16"
        assert float(found[0, 0]) == 1.0


# --- the scores ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_twins_score_the_same(twins, kind):
    flax, pytorch = (scores(gpt, kind) for gpt in twins)
    assert flax.shape == ((B, T, C) if kind == "token" else (B, C))
    np.testing.assert_allclose(flax, pytorch, rtol=0, atol=BOUND)
    assert np.ptp(flax) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_a_score(gpt, kind):
    one, two = scores(gpt, kind), scores(gpt, kind, padding=17)
    real = np.arange(T) < COUNTS[:, None] if kind == "token" else np.full(B, True)
    np.testing.assert_array_equal(one[real], two[real])


def test_a_sequences_score_is_the_head_of_the_mean_of_the_normed_stream(twins):
    _, gpt = twins
    model = classifier(gpt, "sequence")
    hidden = gpt.numpy(model.gpt.hidden(gpt.ints(tokens_of()), None, gpt.ints(COUNTS))[0])
    weight, bias = gpt.numpy(model.head.weight), gpt.numpy(model.head.bias)
    expected = [
        (hidden[b, :n].mean(axis=0) if n else np.zeros(15)) @ weight.T + bias
        for b, n in enumerate(COUNTS)
    ]
    for twin in twins:
        np.testing.assert_allclose(scores(twin, "sequence"), expected, rtol=0, atol=BOUND)


def test_a_tokens_score_sees_itself_and_what_was_before_and_nothing_after(twins):
    _, gpt = twins  # the other twin scores the same
    model, tokens = classifier(gpt, "token"), tokens_of()
    before = gpt.numpy(model(gpt.ints(tokens)))
    tokens[:, 4] = (tokens[:, 4] + 1) % V
    changed = np.abs(gpt.numpy(model(gpt.ints(tokens))) - before).max(axis=-1) > 1e-6
    assert not changed[:, :4].any() and changed[:, 4:].all()


def test_a_row_without_tokens_has_the_score_of_the_bias(gpt):
    model = classifier(gpt, "sequence")
    bias = model.head.bias[...] if gpt.name == "flax" else model.head.bias
    np.testing.assert_array_equal(scores(gpt, "sequence")[2], gpt.numpy(bias))


# --- learning ---


def toy(kind, seed):
    """A task that can be learned: a row's class is the third of the vocabulary that its tokens come
    from; a token's is its id modulo 3."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, T + 1, B)
    if kind == "token":
        tokens = rng.integers(0, V, (B, T))
        return tokens, counts, tokens % C
    labels = rng.integers(0, C, B)
    return rng.integers(0, V // C, (B, T)) + labels[:, None] * (V // C), counts, labels


def batch(gpt, kind, seed, padding=0, unscored=0):
    """A batch of the toy task; padding and labels that do not count may be anything."""
    tokens, counts, labels = toy(kind, seed)
    padded = np.arange(T) >= counts[:, None]
    tokens = np.where(padded, padding, tokens)
    labels = np.where(padded if kind == "token" else counts == 0, unscored, labels)
    return gpt.package.Batch(*map(gpt.ints, (tokens, counts, labels)))


NUM_STEPS = {"token": 250, "sequence": 60}


@functools.cache
def trained(gpt, kind):
    """Losses and the trained state; padding is something else in every step."""
    config = gpt.package.TrainConfig(learning_rate=0.02, weight_decay=0.0)
    model = classifier(gpt, kind, init_std=0.1)
    state = gpt.package.TrainState.create(model, config, task=task_of(gpt, kind))
    losses = []
    for seed in range(NUM_STEPS[kind]):
        noise = seed % V if gpt.name == "flax" else 0  # and of no consequence
        data = batch(gpt, kind, seed, padding=noise, unscored=noise % C)
        with torch.enable_grad():
            result, state = gpt.package.train_step(data, state)
        losses.append(float(result.loss.mean))
        counts = toy(kind, seed)[1]
        scored = counts.sum() if kind == "token" else np.sum(counts > 0)
        assert int(result.loss.num_tokens) == scored
    return np.array(losses), state


@pytest.mark.parametrize("kind", KINDS)
def test_the_twins_train_along_the_same_curve_whatever_the_padding_says(twins, kind):
    (flax, _), (pytorch, _) = (trained(gpt, kind) for gpt in twins)
    np.testing.assert_allclose(flax[:30], pytorch[:30], rtol=0, atol=BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_learns_its_task(gpt, kind):
    losses, state = trained(gpt, kind)
    assert losses[0] == pytest.approx(np.log(C), abs=0.2)
    held_out = [batch(gpt, kind, seed) for seed in range(1000, 1010)]
    found = gpt.package.evaluate(state.model, held_out, task_of(gpt, kind))
    assert float(found.accuracy) > 0.97
    counts = np.concatenate([toy(kind, seed)[1] for seed in range(1000, 1010)])
    expected = counts.sum() if kind == "token" else np.sum(counts > 0)
    assert int(found.loss.num_tokens) == expected


def test_a_classifiers_weights_are_the_same_in_both_twins_and_zeros_without_a_key(twins):
    flax, pytorch = twins
    for kind in KINDS:
        one, two = classifier(flax, kind), classifier(pytorch, kind)
        heads = flax.numpy(one.head.kernel[...]), pytorch.numpy(two.head.weight).T
        np.testing.assert_allclose(*heads, rtol=0, atol=BOUND)
        assert heads[0].std() == pytest.approx(0.3, rel=0.3)
        for gpt in twins:
            empty = getattr(gpt.package, KINDS[kind][0])(gpt.config(num_layers=1), C)
            head = empty.head.kernel[...] if gpt is flax else empty.head.weight
            assert not gpt.numpy(head).any()
