"""One function in two frameworks, and the properties that a causal language model must have."""

import functools

import jax
import numpy as np
import pytest
import torch
from flax import nnx

B, T = 3, 11
BOUND = 1e-12

# jax compiles a call once per shape, which is faster than dispatching its operations one by one.
CALL = {
    "flax": jax.jit(
        lambda model, *arguments: model(*arguments),
    ),
    "torch": lambda model, *arguments: model(*arguments),
}


@functools.cache
def model_of(gpt, **changes):
    """One model for all tests of a twin."""
    return gpt.model(**changes)


@functools.cache
def tokens_of(seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, 61, (B, T))


def logits_of(gpt, tokens, counts=None, key=None, **changes):
    """The twin's logits on the host."""
    counts = None if counts is None else gpt.ints(counts)
    model = model_of(gpt, **changes)
    return gpt.numpy(CALL[gpt.name](model, gpt.ints(tokens), None, counts, key)[0])


def weights_of(gpt, model):
    """Weights by path, in torch's names and layouts."""
    if gpt.name == "torch":
        return {name: gpt.numpy(parameter) for name, parameter in model.named_parameters()}
    weights = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        *module, kind = map(str, path)
        array = gpt.numpy(leaf[...])
        name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
        weights[".".join([*module, name])] = array.T if kind == "kernel" else array
    return weights


def with_the_weights_of_flax(flax, torch_twin):
    """A torch model with exactly the weights of the flax model."""
    model = torch_twin.package.GPT(torch_twin.config())
    weights = weights_of(flax, model_of(flax))
    model.load_state_dict({name: torch_twin.floats(array) for name, array in weights.items()})
    return model


# --- initial weights ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_seed_gives_the_same_initial_weights_in_both_twins(twins, dtype):
    flax, torch = (weights_of(gpt, model_of(gpt, dtype=dtype)) for gpt in twins)
    assert flax.keys() == torch.keys()
    for name, weight in flax.items():
        assert weight.dtype == torch[name].dtype == dtype
        # The normals agree to 8 units, and are then scaled.
        np.testing.assert_allclose(weight, torch[name], rtol=10 * np.finfo(dtype).eps, atol=0)


def test_every_weight_matrix_has_numbers_of_its_own(gpt):
    weights = weights_of(gpt, model_of(gpt))
    matrices = [x for name, x in weights.items() if x.ndim == 2]
    assert len(matrices) == 2 + 6 * model_of(gpt).config.num_layers
    beginnings = {y.ravel()[:3].tobytes() for x in matrices for y in (x, x.T)}
    assert len(beginnings) == 2 * len(matrices)


def test_another_seed_gives_other_weights(gpt):
    one, two = weights_of(gpt, model_of(gpt)), weights_of(gpt, gpt.model(seed=2))
    for name, weight in one.items():
        assert np.array_equal(weight, two[name]) == (weight.ndim == 1)


def test_maps_into_the_stream_start_smaller_with_depth(gpt):
    config, weights = gpt.config(), weights_of(gpt, model_of(gpt))
    for name, weight in weights.items():
        if weight.ndim == 2:
            into_stream = name.endswith(("out.weight", "down.weight"))
            std = config.init_std / ((2 * config.num_layers) ** 0.5 if into_stream else 1.0)
            # Five standard errors of a standard deviation.
            assert abs(weight.std() / std - 1.0) <= 5 / (2 * weight.size) ** 0.5


def test_norms_start_as_the_identity_and_biases_at_zero(gpt):
    for name, weight in weights_of(gpt, model_of(gpt)).items():
        if weight.ndim == 1:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all()


def test_without_a_key_every_drawn_weight_is_zero(gpt):
    drawn, empty = model_of(gpt), gpt.package.GPT(gpt.config())
    for (name, x), y in zip(
        weights_of(gpt, drawn).items(), weights_of(gpt, empty).values(), strict=True
    ):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(y, np.zeros_like(x) if x.ndim == 2 else x, name)


# --- the forward pass ---


def test_the_twins_are_one_function(twins):
    flax, torch = twins
    expected = logits_of(flax, tokens_of())
    found, _ = with_the_weights_of_flax(*twins)(torch.ints(tokens_of()))
    assert expected.std() > 0.5  # far from constant
    np.testing.assert_allclose(torch.numpy(found), expected, rtol=0, atol=BOUND)


def test_the_twins_are_one_function_from_the_seed_on(twins):
    flax, torch = (logits_of(gpt, tokens_of(), (7, 11, 2)) for gpt in twins)
    real = np.arange(T) < np.array([[7], [11], [2]])
    np.testing.assert_allclose(flax[real], torch[real], rtol=0, atol=1e-11)


def test_a_token_changes_nothing_before_itself_and_all_behind(gpt):
    before = logits_of(gpt, tokens_of())
    for t in (0, 4, T - 1):
        tokens = tokens_of().copy()
        tokens[:, t] = (tokens[:, t] + 1) % 61
        gap = np.abs(logits_of(gpt, tokens) - before).max(axis=2)
        assert gap[:, :t].max(initial=0.0) <= BOUND
        assert gap[:, t:].min() > 1e-6


@pytest.mark.parametrize("padding", [0, -1, 61 + 5, -100])
def test_what_padding_is_made_of_does_not_matter(gpt, padding):
    counts = np.array((7, 11, 2))
    real = np.arange(T) < counts[:, None]
    tokens = np.where(real, tokens_of(), padding)
    found, expected = logits_of(gpt, tokens, counts), logits_of(gpt, tokens_of())
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=BOUND)


def test_rows_do_not_know_of_each_other(gpt):
    expected, counts = logits_of(gpt, tokens_of(), (7, 11, 2)), np.array((7, 11, 2))
    for rows in ([2, 0, 1], [1, 1, 1]):
        found = logits_of(gpt, tokens_of()[rows], counts[rows])
        np.testing.assert_allclose(found, expected[rows], rtol=0, atol=BOUND)
    alone = logits_of(gpt, tokens_of()[:1], counts[:1])
    np.testing.assert_allclose(alone, expected[:1], rtol=0, atol=BOUND)


def test_a_row_without_tokens_is_finite(gpt):
    assert np.isfinite(logits_of(gpt, tokens_of(), (0, 3, 0))).all()


def test_a_position_is_not_a_token(gpt):
    # The same token everywhere: only the position table can tell the places apart.
    logits = logits_of(gpt, np.full((B, T), 5))
    gaps = np.abs(np.diff(logits[0], axis=0)).max(axis=1)
    assert gaps.min() > 1e-3


def test_the_longest_context_fits_and_one_token_more_is_refused(gpt):
    model, length = model_of(gpt), model_of(gpt).config.context_length
    tokens = np.random.default_rng(0).integers(0, 61, (2, length + 1))
    assert logits_of(gpt, tokens[:, :length]).shape == (2, length, 61)
    with pytest.raises(ValueError, match=r"GPT: 30 tokens > context_length 29. Positions end"):
        model(gpt.ints(tokens))


def test_without_a_cache_none_comes_back(gpt):
    _, cache = CALL[gpt.name](model_of(gpt), gpt.ints(tokens_of()))
    assert cache is None


def test_a_norm_does_not_lose_the_variance_in_a_large_mean(gpt):
    # The mean of squares minus the square of the mean would be off in the third digit here.
    x = 1e6 + np.random.default_rng(0).normal(size=(B, T, 15))
    expected = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + 1e-5)
    found = gpt.package.build.norm(gpt.config())(gpt.floats(x))
    np.testing.assert_allclose(gpt.numpy(found), expected, rtol=0, atol=1e-8)


# --- dropout ---


def test_one_key_drops_the_same_elements_in_both_twins(twins):
    plain, dropped = (
        [logits_of(gpt, tokens_of(), None, key(gpt), dropout=0.3) for gpt in twins]
        for key in (lambda gpt: None, lambda gpt: gpt.random.key(7))
    )
    assert np.abs(plain[0] - dropped[0]).min(axis=2).max() > 1e-3
    np.testing.assert_allclose(*dropped, rtol=0, atol=1e-11)


def test_one_key_drops_the_same_elements_again_and_another_key_others(gpt):
    one, again, other = (
        logits_of(gpt, tokens_of(), None, gpt.random.key(seed), dropout=0.3) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_without_a_key_nothing_is_dropped(gpt):
    found = logits_of(gpt, tokens_of(), dropout=0.3)
    np.testing.assert_allclose(found, logits_of(gpt, tokens_of()), rtol=0, atol=BOUND)


def test_a_rate_of_zero_drops_nothing_whatever_the_key(gpt):
    found = logits_of(gpt, tokens_of(), None, gpt.random.key(7))
    np.testing.assert_allclose(found, logits_of(gpt, tokens_of()), rtol=0, atol=BOUND)


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_dropout_drops_its_share_and_scales_up_the_rest(gpt, rate):
    count = 40_009
    ones = gpt.floats(np.ones((1, count)))
    x = gpt.numpy(gpt.package.model.dropout(ones, rate, gpt.random.key(3)))
    dropped = x == 0.0
    assert abs(dropped.mean() - rate) <= 5 * (rate * (1 - rate) / count) ** 0.5
    np.testing.assert_allclose(x[~dropped], 1 / (1 - rate), rtol=1e-15)


def test_every_place_that_gpt_2_drops_at_has_a_mask_of_its_own(gpt, monkeypatch):
    model, dropout, used = model_of(gpt, dropout=0.3), gpt.package.model.dropout, []

    def recording(x, rate, key):
        used.append(key)
        return dropout(x, rate, key)

    def keys(key):
        model(gpt.ints(tokens_of()), None, None, key)
        return used

    for module in (gpt.package.model, gpt.package.layers):
        monkeypatch.setattr(module, "dropout", recording)
    found = (jax.jit(keys) if gpt.name == "flax" else keys)(gpt.random.key(7))
    # Once for the embeddings; per block the attention weights and the two residual branches.
    assert len(found) == 1 + 3 * gpt.config().num_layers
    assert len({gpt.numpy(key).tobytes() for key in found}) == len(found)


# --- dtypes ---


def test_a_float32_model_is_float32_throughout_under_strict_promotion(gpt):
    package = gpt.package
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        model = gpt.model(dtype="float32")
        tokens, counts = gpt.ints(tokens_of()), gpt.ints((7, 11, 2))
        cache = package.KVCache.empty(model.config, B, T)
        whole, _ = CALL[gpt.name](model, tokens, None, counts)
        found, cache = CALL[gpt.name](model, tokens, cache, counts)
        loss = package.next_token_loss(whole, tokens, counts)
        arrays = [whole, found, loss.total, loss.mean, cache.layers[0].keys_BKSH]
    assert {gpt.numpy(array).dtype.name for array in arrays} == {"float32"}
    real = np.arange(T) < np.array([[7], [11], [2]])
    np.testing.assert_allclose(gpt.numpy(found)[real], gpt.numpy(whole)[real], rtol=0, atol=1e-5)


def test_the_float32_twins_agree_to_rounding(twins):
    found = []
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        for gpt in twins:
            logits, _ = CALL[gpt.name](model_of(gpt, dtype="float32"), gpt.ints(tokens_of()))
            found.append(gpt.numpy(logits))
    assert found[0].dtype == found[1].dtype == "float32"
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)


def test_a_float64_flax_model_is_refused_where_jax_would_make_it_float32(twins):
    flax, torch_twin = twins
    message = "GPT: dtype float64 with jax_enable_x64 off. jax would compute in float32. Build and"
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=message):
            flax.model()
        weight = torch_twin.model().token_embedding.weight
    assert weight.dtype == torch.float64
