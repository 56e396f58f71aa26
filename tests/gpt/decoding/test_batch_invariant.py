"""The numbers of a token are the same to the last bit in whatever calls its row came."""

import functools

import jax
import numpy as np
import pytest

B, T = 3, 7
COUNTS = (7, 2, 5)


def tokens_of(length=T, rows=B, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (rows, length))


@functools.cache
def compiled_prefill(gpt, dtype):
    """`prefill` of the model of that dtype, or its step where there is one token."""
    model = gpt.model(dtype=dtype, num_layers=1)

    def prefill(tokens, cache):
        plain = isinstance(cache, gpt.package.KVCache)
        module = gpt.package.decode if plain else gpt.package.decoding.batch_invariant
        if tokens.shape[1] == 1:
            return module.decode_step(model, tokens[:, 0], cache)
        return module.prefill(model, tokens, cache)

    return jax.jit(prefill) if gpt.name == "flax" else prefill


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("split", [(1,) * 19, (5, 1, 1, 9, 3)], ids=["steps", "parts"])
def test_the_bits_are_the_same_however_the_tokens_came(gpt, dtype, split):
    model, tokens = gpt.model(dtype=dtype, num_layers=1), tokens_of(19)
    prefill = compiled_prefill(gpt, dtype)
    empty = gpt.package.BatchInvariantCache.empty(model.config, B, 24)
    expected, whole = prefill(gpt.ints(tokens), empty)
    cache, start = empty, 0
    for width in split:
        logits, cache = prefill(gpt.ints(tokens[:, start : start + width]), cache)
        start += width
    np.testing.assert_array_equal(gpt.numpy(logits), gpt.numpy(expected))
    for one, two in zip(cache.blocks.layers, whole.blocks.layers, strict=True):
        held = gpt.numpy(one.keys_BKSH)[:, :, :19], gpt.numpy(two.keys_BKSH)[:, :, :19]
        np.testing.assert_array_equal(*held)
    near = gpt.numpy(model(gpt.ints(tokens))[0])[:, -1]
    np.testing.assert_allclose(
        gpt.numpy(logits), near, rtol=0, atol=1e-12 if dtype[-2:] == "64" else 1e-4
    )


def test_without_it_the_bits_do_depend_on_how_the_tokens_came(gpt):
    model, tokens = gpt.model(dtype="float32", num_layers=1), gpt.ints(tokens_of(19))
    prefill = compiled_prefill(gpt, "float32")
    empty = gpt.package.KVCache.empty(model.config, B, 24)
    whole, _ = prefill(tokens, empty)
    _, cache = prefill(tokens[:, :6], empty)
    parts, _ = prefill(tokens[:, 6:], cache)
    assert (gpt.numpy(whole) != gpt.numpy(parts)).any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_generation_has_the_same_margins_with_and_without_its_cache(gpt, dtype):
    model, prompts = gpt.model(dtype=dtype), gpt.ints(tokens_of())
    decoder = gpt.package.BatchInvariantDecoder(model, B)
    one, two = (
        gpt.package.generate(decoder, prompts, 12, gpt.ints(COUNTS), use_cache=use_cache)
        for use_cache in (True, False)
    )
    np.testing.assert_array_equal(gpt.numpy(one.tokens_BG), gpt.numpy(two.tokens_BG))
    np.testing.assert_array_equal(gpt.numpy(one.margins_BG), gpt.numpy(two.margins_BG))


def test_ragged_rows_have_the_bits_of_rows_that_came_at_once(gpt):
    model, tokens = gpt.model(dtype="float32", num_layers=1), tokens_of(21)
    module, counts = gpt.package.decoding.batch_invariant, np.array((21, 17, 3))
    empty = gpt.package.BatchInvariantCache.empty(model.config, B, 24)
    expected, _ = module.prefill(model, gpt.ints(tokens), empty, gpt.ints(counts))
    _, cache = module.prefill(model, gpt.ints(tokens[:, :9]), empty, gpt.ints((9, 5, 1)))
    part = np.stack([np.resize(row[n:], 12) for row, n in zip(tokens, (9, 5, 1), strict=True)])
    found, cache = module.prefill(model, gpt.ints(part), cache, gpt.ints((12, 12, 2)))
    np.testing.assert_array_equal(gpt.numpy(found), gpt.numpy(expected))
    np.testing.assert_array_equal(gpt.numpy(cache.lengths_B), counts)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_cache_is_a_value_that_can_be_continued_twice(gpt, order):
    model, module = gpt.model(num_layers=1), gpt.package.decoding.batch_invariant
    empty = gpt.package.BatchInvariantCache.empty(model.config, B, 24)
    _, cache = module.prefill(model, gpt.ints(tokens_of(14)), empty)
    for seed in order:
        new, longer = tokens_of(5, seed=seed), cache
        for t in range(5):
            logits, longer = module.decode_step(model, gpt.ints(new[:, t]), longer)
        whole = np.concatenate([tokens_of(14), new], axis=1)
        expected, _ = module.prefill(model, gpt.ints(whole), empty)
        near = gpt.numpy(model(gpt.ints(whole))[0])[:, -1]
        np.testing.assert_allclose(gpt.numpy(logits), near, rtol=0, atol=1e-12)
        np.testing.assert_allclose(gpt.numpy(logits), gpt.numpy(expected), rtol=0, atol=1e-13)


def test_steps_of_torch_write_in_place(twins):
    _, gpt = twins
    model, module = gpt.model(num_layers=1), gpt.package.decoding.batch_invariant
    _, cache = module.prefill(
        model, gpt.ints(tokens_of()), gpt.package.BatchInvariantCache.empty(model.config, B, 24)
    )
    places = cache.blocks.layers[0].keys_BKSH.data_ptr()
    for token in range(12):  # over the end of a block
        _, cache = module.decode_step(model, gpt.ints([token] * B), cache)
    assert cache.blocks.layers[0].keys_BKSH.data_ptr() == places


def test_more_tokens_than_slots_are_refused(gpt):
    model, module = gpt.model(num_layers=1), gpt.package.decoding.batch_invariant
    cache = gpt.package.BatchInvariantCache.empty(model.config, B, 8)
    _, cache = module.prefill(model, gpt.ints(tokens_of()), cache)
    with pytest.raises(ValueError, match=r"= 14 > capacity 8. A cache never overwrites"):
        module.prefill(model, gpt.ints(tokens_of()), cache)
    assert cache.capacity == 8 and cache.grow(16).capacity == 16
