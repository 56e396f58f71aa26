"""The two pure functions of decoding: prefill, at once and in parts, and single steps."""

import functools

import jax
import numpy as np
import torch

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


def test_a_prefill_and_steps_give_the_logits_of_the_whole_sequence(gpt):
    call, model, counts = CALL[gpt.name], model_of(gpt), np.array(COUNTS)
    rows = np.random.default_rng(1).integers(0, 61, (B, T + G))
    expected = uncached(gpt, rows)
    cache = gpt.package.KVCache.empty(model.config, B, T + G)
    prompts = gpt.ints(rows[:, :T])
    logits, cache = call(gpt.package.prefill, model, prompts, cache, gpt.ints(counts))
    for t in range(4):
        behind = expected[np.arange(B), counts + t - 1]
        np.testing.assert_allclose(gpt.numpy(logits), behind, rtol=0, atol=BOUND)
        tokens = gpt.ints(rows[np.arange(B), counts + t])
        logits, cache = call(gpt.package.decode_step, model, tokens, cache)
    np.testing.assert_array_equal(gpt.numpy(cache.lengths_B), counts + 4)


def test_a_prompt_can_be_prefilled_in_parts(gpt):
    call, model = CALL[gpt.name], model_of(gpt)
    cache = gpt.package.KVCache.empty(model.config, B, T + G)
    for part in (tokens_of()[:, :3], tokens_of()[:, 3:]):
        logits, cache = call(gpt.package.prefill, model, gpt.ints(part), cache)
    expected = uncached(gpt, np.pad(tokens_of(), ((0, 0), (0, G))))[:, T - 1]
    np.testing.assert_allclose(gpt.numpy(logits), expected, rtol=0, atol=BOUND)


def test_decoding_in_torch_needs_no_gradients_and_makes_none(twins):
    _, gpt = twins
    model, tokens = model_of(gpt), gpt.ints(tokens_of())
    with torch.enable_grad():
        logits, cache = gpt.package.prefill(
            model, tokens, gpt.package.KVCache.empty(model.config, B, T + G)
        )
        more, longer = gpt.package.decode_step(model, tokens[:, 0], cache)
        generation = gpt.package.generate(model, tokens, 2)
        assert torch.is_grad_enabled()
    arrays = [logits, more, generation.tokens_BG]
    for layer in (*cache.layers, *longer.layers):
        arrays += [layer.keys_BKSH, layer.values_BKSH]
    assert not any(array.requires_grad for array in arrays)
    # No append had to copy for the sake of a backward graph.
    assert cache.layers[0].keys_BKSH.data_ptr() == longer.layers[0].keys_BKSH.data_ptr()


def test_a_warm_cache_takes_chunks(gpt):
    model, counts = gpt.model(num_layers=1), gpt.ints((5, 1, 3))
    more = gpt.ints(np.random.default_rng(1).integers(0, 61, (B, 5)))
    cache = gpt.package.KVCache.empty(model.config, B, 20)
    _, cache = gpt.package.prefill(model, gpt.ints(tokens_of()), cache, gpt.ints(COUNTS))
    found, longer = gpt.package.prefill(model, more, cache, counts, chunk=2)
    expected, same = gpt.package.prefill(model, more, cache, counts)
    np.testing.assert_allclose(gpt.numpy(found), gpt.numpy(expected), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(gpt.numpy(longer.lengths_B), gpt.numpy(same.lengths_B))
