"""The generator is `jax.random`'s: the same bits in both twins, and the same laws."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import torch_gpt.random

SEEDS = st.integers(0, 2**64 - 1)
# A fixed set, because jax compiles once per shape; a scalar and an empty array among them.
SHAPES = st.sampled_from([(), (0,), (3, 5)])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

# The fixture only turns 64-bit types on, so every example may share it.
examples = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def typed(seed: int) -> jax.Array:
    """The same key as jax itself makes it."""
    return jax.random.key(np.uint64(seed))


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Equal to the last bit, in shape and in type."""
    x, y = np.asarray(x), np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def units_in_the_last_place(x: np.ndarray, y: np.ndarray) -> float:
    """The largest distance, counted in floats that lie between."""
    return float(np.max(np.abs(x - y) / np.spacing(np.maximum(np.abs(x), np.abs(y)))))


@examples
@hypothesis.given(seed=SEEDS)
def test_a_key_is_the_key_of_jax_random(gpt, seed):
    assert same_bits(gpt.numpy(gpt.random.key(seed)), jax.random.key_data(typed(seed)))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(gpt, seed):
    with pytest.raises(ValueError, match=rf"random.key: seed {seed} is outside \[0, 2\*\*64\)"):
        gpt.random.key(seed)


@examples
@hypothesis.given(seed=SEEDS, num=st.sampled_from([1, 2, 5]))
def test_split_is_the_split_of_jax_random(gpt, seed, num):
    keys = gpt.numpy(gpt.random.split(gpt.random.key(seed), num))
    assert same_bits(keys, jax.random.key_data(jax.random.split(typed(seed), num)))


@examples
@hypothesis.given(seed=SEEDS, data=st.integers(0, 2**32 - 1))
def test_fold_in_is_the_fold_in_of_jax_random(gpt, seed, data):
    key = gpt.numpy(gpt.random.fold_in(gpt.random.key(seed), data))
    assert same_bits(key, jax.random.key_data(jax.random.fold_in(typed(seed), data)))


def test_a_number_can_be_folded_in_as_an_array(gpt):
    key, number = gpt.random.key(3), 17
    as_array = gpt.random.fold_in(key, gpt.ints(number))
    assert same_bits(gpt.numpy(as_array), gpt.numpy(gpt.random.fold_in(key, number)))


@pytest.mark.parametrize("width", [32, 64])
@examples
@hypothesis.given(seed=SEEDS, shape=SHAPES)
def test_bits_are_the_bits_of_jax_random(gpt, width, seed, shape):
    words = gpt.numpy(gpt.random.bits(gpt.random.key(seed), shape, width))
    assert same_bits(words, jax.random.bits(typed(seed), shape, f"uint{width}"))


@pytest.mark.parametrize("width", [32, 64])
def test_more_bits_than_one_pass_makes_are_still_the_same(gpt, width):
    shape = 3, torch_gpt.random._CHUNK["cpu"] // 2 + 7  # torch works in passes of counters
    words = gpt.numpy(gpt.random.bits(gpt.random.key(5), shape, width))
    assert same_bits(words, jax.random.bits(typed(5), shape, f"uint{width}"))


@DTYPES
@examples
@hypothesis.given(seed=SEEDS, shape=SHAPES)
def test_uniforms_are_the_uniforms_of_jax_random(gpt, dtype, seed, shape):
    numbers = gpt.numpy(gpt.random.uniform(gpt.random.key(seed), shape, dtype))
    assert same_bits(numbers, jax.random.uniform(typed(seed), shape, dtype))


@examples
@hypothesis.given(seed=SEEDS, shape=SHAPES, probability=st.floats(0.0, 1.0))
def test_booleans_are_the_booleans_of_jax_random(gpt, seed, shape, probability):
    booleans = gpt.numpy(gpt.random.bernoulli(gpt.random.key(seed), probability, shape))
    expected = jax.random.bernoulli(typed(seed), np.float32(probability), shape)
    assert same_bits(booleans, expected)


@DTYPES
@examples
@hypothesis.given(seed=SEEDS, shape=SHAPES)
def test_gumbels_are_the_gumbels_of_jax_random(gpt, dtype, seed, shape):
    numbers = gpt.numpy(gpt.random.gumbel(gpt.random.key(seed), shape, dtype))
    expected = np.asarray(jax.random.gumbel(typed(seed), shape, dtype))
    assert (numbers.dtype, numbers.shape) == (expected.dtype, shape)
    # Two logarithms in a row: the outer one turns relative errors into absolute ones. Not bitwise
    # even in jax, whose logarithm rounds differently in and out of a vector register.
    unit = np.finfo(dtype).eps * np.maximum(1.0, np.abs(expected))
    assert np.all(np.abs(numbers - expected) <= 4 * unit)


@DTYPES
@examples
@hypothesis.given(seed=SEEDS)
def test_the_highest_of_perturbed_logits_is_the_draw_of_jax_random(gpt, dtype, seed):
    logits = np.random.default_rng(seed).normal(size=(13, 5)).astype(dtype)
    scores = gpt.numpy(gpt.random.perturb(gpt.random.key(seed), gpt.floats(logits)))
    assert scores.dtype == dtype
    # In float64 too it is the draw of float32, so that a seed means the same in both.
    expected = jax.random.categorical(typed(seed), logits.astype("float32"))
    np.testing.assert_array_equal(np.argmax(scores, axis=-1), expected)


def test_the_noise_of_a_row_does_not_depend_on_how_many_there_are(gpt):
    key, zeros = gpt.random.key(4), np.zeros((5, 7))
    noise = gpt.numpy(gpt.random.perturb(key, gpt.floats(zeros)))
    for num in (1, 3):
        first = gpt.numpy(gpt.random.perturb(key, gpt.floats(zeros[:num])))
        # But for the last digit: jax's logarithm rounds differently out of a vector register.
        np.testing.assert_allclose(first, noise[:num], rtol=0, atol=1e-5)
    assert len(np.unique(noise)) == noise.size


def test_the_highest_of_perturbed_logits_follows_the_softmax(gpt):
    shares, draws = np.array([0.1, 0.0, 0.6, 0.3]), 40_009
    with np.errstate(divide="ignore"):
        logits = np.broadcast_to(np.log(shares), (draws, 4))
    scores = gpt.numpy(gpt.random.perturb(gpt.random.key(11), gpt.floats(logits)))
    found = np.bincount(np.argmax(scores, axis=-1), minlength=4) / draws
    assert found[1] == 0.0
    np.testing.assert_allclose(found, shares, atol=5 * 0.5 / draws**0.5)


@DTYPES
@examples
@hypothesis.given(seed=SEEDS, shape=SHAPES)
def test_the_twins_draw_the_same_bits(twins, dtype, seed, shape):
    flax, torch = twins
    keys = flax.random.key(seed), torch.random.key(seed)
    for draw in (
        lambda gpt, key: gpt.random.split(key, 3),
        lambda gpt, key: gpt.random.fold_in(key, seed % 2**32),
        lambda gpt, key: gpt.random.bits(key, shape, {"float32": 32, "float64": 64}[dtype]),
        lambda gpt, key: gpt.random.uniform(key, shape, dtype),
        lambda gpt, key: gpt.random.bernoulli(key, 0.3, shape),
    ):
        ours, theirs = (gpt.numpy(draw(gpt, key)) for gpt, key in zip(twins, keys, strict=True))
        assert same_bits(ours, theirs)


# The two libraries' ndtri are different polynomials, each good to a few units.
@pytest.mark.parametrize("dtype, units", [("float32", 8), ("float64", 4)])
@examples
@hypothesis.given(seed=SEEDS)
def test_the_twins_draw_the_same_normals_but_for_the_last_digits(twins, dtype, units, seed):
    shape = 7, 1009
    ours, theirs = (
        gpt.numpy(gpt.random.normal(gpt.random.key(seed), shape, dtype)) for gpt in twins
    )
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) == (dtype, shape)
    assert units_in_the_last_place(ours, theirs) <= units


@DTYPES
@examples
@hypothesis.given(seed=SEEDS)
def test_normals_are_near_those_of_jax_random(gpt, dtype, seed):
    shape = 7, 1009
    numbers = gpt.numpy(gpt.random.normal(gpt.random.key(seed), shape, dtype))
    expected = jax.random.normal(typed(seed), shape, dtype)
    # jax's own inverse of the error function is off by 90 units in the tails.
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-4)


@DTYPES
def test_the_lowest_and_the_highest_uniform_give_finite_numbers(gpt, dtype, monkeypatch):
    extremes = np.array([0.0, np.nextafter(np.asarray(1.0, dtype), np.asarray(0.0, dtype))], dtype)
    monkeypatch.setattr(gpt.random, "uniform", lambda *_: gpt.floats(extremes))
    for draw, lowest, highest in ((gpt.random.normal, -5, 5), (gpt.random.gumbel, -4, 15)):
        with jax.disable_jit():  # jax would keep a program with these extremes in it
            low, high = gpt.numpy(draw(gpt.random.key(0), (2,), dtype))
        assert np.isfinite([low, high]).all()
        assert low < lowest and high > highest


@DTYPES
def test_normals_have_the_moments_of_the_standard_normal(gpt, dtype):
    count = 100_003
    x = gpt.numpy(gpt.random.normal(gpt.random.key(2), (count,), dtype)).astype("float64")
    # Within five standard errors, by the variances of x, x**2, x**3 and x**4.
    for power, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(np.mean(x**power) - moment) <= 5 * (variance / count) ** 0.5


@DTYPES
def test_uniforms_fill_the_interval_evenly(gpt, dtype):
    count, bins = 100_003, 17
    x = gpt.numpy(gpt.random.uniform(gpt.random.key(2), (count,), dtype))
    assert x.min() >= 0.0 and x.max() < 1.0
    share = np.histogram(x, bins=bins, range=(0.0, 1.0))[0] / count
    np.testing.assert_allclose(share, 1 / bins, atol=5 * (1 / bins / count) ** 0.5)


def test_a_key_stays_what_it_is(gpt):
    key = gpt.random.key(2**40 + 3)
    before = gpt.numpy(key).copy()
    first = gpt.numpy(gpt.random.normal(key, (7,), "float64"))
    gpt.random.split(key, 5), gpt.random.fold_in(key, 3)
    assert same_bits(gpt.numpy(key), before)
    assert same_bits(gpt.numpy(gpt.random.normal(key, (7,), "float64")), first)


def test_the_children_of_a_key_all_differ(gpt):
    key = gpt.random.key(0)
    folded = [gpt.numpy(gpt.random.fold_in(key, number)) for number in range(11)]
    keys = [gpt.numpy(key), *gpt.numpy(gpt.random.split(key, 11)), *folded]
    # split and fold_in count alike, so the numbers of one are those of the other.
    assert len({x.tobytes() for x in keys}) == 12


def test_the_numbers_do_not_depend_on_a_flag_of_jax(twins):
    flax, _ = twins
    draws = (
        lambda key: flax.random.split(key, 5),
        lambda key: flax.random.fold_in(key, 7),
        lambda key: flax.random.bits(key, (3, 5), 64),
        lambda key: flax.random.uniform(key, (3, 5)),
        lambda key: flax.random.bernoulli(key, 0.5, (3, 5)),
        lambda key: flax.random.normal(key, (3, 5)),
        lambda key: flax.random.gumbel(key, (3, 5)),
    )
    key = flax.random.key(13)
    with jax.threefry_partitionable(True):
        expected = [draw(key) for draw in draws]
    with jax.threefry_partitionable(False):
        found = [draw(key) for draw in draws]
        split_by_jax = jax.random.key_data(jax.random.split(typed(13), 5))
    assert not same_bits(split_by_jax, expected[0])  # the flag does change jax itself
    assert all(same_bits(x, y) for x, y in zip(found, expected, strict=True))


def test_the_numbers_are_the_same_inside_a_compiled_function(twins):
    flax, _ = twins
    for draw in (flax.random.uniform, flax.random.gumbel, flax.random.normal):
        compiled = jax.jit(lambda key, draw=draw: draw(key, (3, 5), "float64"))
        np.testing.assert_array_max_ulp(
            np.asarray(compiled(flax.random.key(13))),
            np.asarray(draw(flax.random.key(13), (3, 5), "float64")),
            maxulp=0 if draw is flax.random.uniform else 4,
        )
