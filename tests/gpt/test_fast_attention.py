"""The fast attention is the definition, gradients and garbage in free slots included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

B, S = 3, 600  # sizes that jax may read: 0, 256, 512, 600
BOUND = 1e-12
LENGTHS = (7, 300, 0), (256, 256, 256), (598, 2, 513), (0, 0, 0)
CALLS = (
    (1, None),
    (3, None),
    (3, (3, 1, 2)),
    (2, (0, 2, 1)),
)  # tokens, and the real ones of each row
KINDS = {
    "learned": dict(),
    "rotary": dict(positions="rotary", head_dim=6, num_kv_heads=1, qk_norm="head"),
    "alibi": dict(positions="alibi", window=200, num_full_layers=1),
    "t5": dict(positions="t5", num_kv_heads=3),
    "none": dict(positions="none", window=5),
}


@functools.cache
def pair_of(gpt, kind):
    """A model with the fast attention, and one with the definition and the same weights."""
    model = gpt.model(context_length=640, **KINDS[kind])
    return model, model.with_attend(gpt.package.attention.attend)


@functools.cache
def cache_of(gpt, kind, lengths, garbage=0.0):
    """Random keys and values below the lengths, and something else beyond."""
    config, rng = pair_of(gpt, kind)[0].config, np.random.default_rng(0)
    free = np.arange(S)[None, :] >= np.array(lengths)[:, None]

    def slots():
        numbers = rng.standard_normal((B, config.kv_heads, S, config.head_width))
        return gpt.floats(np.where(free[:, None, :, None], garbage, numbers))

    layers = tuple(gpt.package.LayerCache(slots(), slots()) for _ in range(config.num_layers))
    return gpt.package.KVCache(layers, gpt.ints(lengths))


def tokens_of(gpt, num_tokens):
    return gpt.ints(np.random.default_rng(1).integers(0, 61, (B, num_tokens)))


def call(gpt, model, cache, num_tokens, counts, compiled):
    """Logits of the real tokens, and keys and values of all layers, on the host."""

    def run(tokens, cache, counts):
        return model(tokens, cache, counts)

    if compiled:
        run = jax.jit(run)
    counts = None if counts is None else gpt.ints(counts)
    logits, longer = run(tokens_of(gpt, num_tokens), cache, counts)
    real = np.arange(num_tokens) < (num_tokens if counts is None else gpt.numpy(counts)[:, None])
    slots = [x for layer in longer.layers for x in (layer.keys_BKSH, layer.values_BKSH)]
    filled = np.arange(S)[None, :] < gpt.numpy(longer.lengths_B)[:, None]
    held = [np.where(filled[:, None, :, None], gpt.numpy(x), 0.0) for x in slots]
    return [gpt.numpy(logits)[np.broadcast_to(real, (B, num_tokens))], *held]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_logits_and_caches_are_those_of_the_definition(gpt, kind, lengths):
    fast, definition = pair_of(gpt, kind)
    cache = cache_of(gpt, kind, lengths)
    num_tokens, counts = CALLS[LENGTHS.index(lengths)]
    if max(lengths) + num_tokens > S:
        num_tokens, counts = 2, None
    expected = call(gpt, definition, cache, num_tokens, counts, compiled=False)
    for compiled in (False, True)[: 2 if gpt.name == "flax" else 1]:
        for garbage in (0.0, np.nan, 1e30):
            dirty = cache_of(gpt, kind, lengths, garbage)
            for model in (fast, definition):
                found = call(gpt, model, dirty, num_tokens, counts, compiled)
                for one, two in zip(found, expected, strict=True):
                    np.testing.assert_allclose(one, two, rtol=0, atol=BOUND)


@pytest.mark.parametrize("num_tokens, counts", CALLS)
@pytest.mark.parametrize("lengths", LENGTHS[:2])
def test_every_kind_of_call_is_that_of_the_definition(gpt, lengths, num_tokens, counts):
    fast, definition = pair_of(gpt, "learned")
    cache = cache_of(gpt, "learned", lengths, np.nan)
    found, expected = (
        call(gpt, model, cache, num_tokens, counts, compiled=gpt.name == "flax")
        for model in (fast, definition)
    )
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=BOUND)


def gradients(gpt, model, cache, tokens, counts):
    """Gradients of all weights, through a call over a cache."""
    if gpt.name == "torch":
        weights = list(model.parameters())
        with torch.enable_grad():
            loss = model(tokens, cache, counts)[0].square().sum()
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [gpt.numpy(x) for x in found if x is not None]
    graphdef, weights = nnx.split(model)

    @jax.jit
    def gradient(weights, cache):
        def loss(weights):
            return jnp.sum(nnx.merge(graphdef, weights)(tokens, cache, counts)[0] ** 2)

        return jax.grad(loss)(weights)

    return [np.asarray(x) for x in jax.tree.leaves(gradient(weights, cache))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [0.0, np.nan, 1e30])
def test_gradients_are_those_of_the_definition(gpt, kind, garbage):
    cache = cache_of(gpt, kind, LENGTHS[0], garbage)
    tokens, counts = tokens_of(gpt, 3), gpt.ints((3, 1, 2))
    fast, definition = (
        gradients(gpt, model, cache, tokens, counts) for model in pair_of(gpt, kind)
    )
    assert len(fast) == len(definition) > 10
    for one, two in zip(fast, definition, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, two, rtol=0, atol=BOUND * max(1.0, np.abs(two).max()))


def test_without_a_cache_it_is_the_definition_to_the_last_bit(gpt):
    fast, definition = pair_of(gpt, "learned")
    tokens, key = tokens_of(gpt, 5), gpt.random.key(0)
    for arguments in ((None, None, None), (None, gpt.ints((5, 2, 0)), key)):
        found, expected = (gpt.numpy(x(tokens, *arguments)[0]) for x in (fast, definition))
        np.testing.assert_array_equal(found, expected)


def test_weights_can_be_seen_with_a_cache_too(gpt):
    fast, _ = pair_of(gpt, "learned")
    heard = []

    def recording(q_BKQTH, new, past, metadata, drop):
        def keep(weights):
            heard.append(gpt.numpy(weights))
            return drop(weights)

        return gpt.package.fast_attention.attend(q_BKQTH, new, past, metadata, keep)

    cache = cache_of(gpt, "learned", LENGTHS[0])
    fast.with_attend(recording)(tokens_of(gpt, 2), cache)
    assert len(heard) == fast.config.num_layers
    for weights in heard:
        np.testing.assert_allclose(weights.sum(-1), 1.0)


# --- what is read ---


def test_what_is_read_follows_the_length(gpt):
    def sizes(longest, num_slots=5000):
        return gpt.package.fast_attention.slots_to_read(num_slots, longest)

    # jax the smallest of a few sizes that reaches the longest row, torch to its end.
    flax = gpt.name == "flax"
    assert sizes(0) == (((0,) if flax else (1,)), 0)
    assert sizes(7) == (((256,) if flax else (7,)), 0)
    assert sizes(256) == ((256,), 0)
    assert sizes(257) == (((512,) if flax else (257,)), 0)
    assert sizes(4100) == (((5000,) if flax else (4100,)), 0)
    assert sizes(5000) == ((5000,), 0)


def test_a_compiled_program_chooses_the_smallest_size_as_it_runs(twins):
    flax, _ = twins

    def size(longest):
        sizes, index = flax.package.fast_attention.slots_to_read(5000, longest)
        assert sizes == (0, 256, 512, 1024, 2048, 4096, 5000)
        return jnp.asarray(sizes)[index]

    for length, expected in ((0, 0), (1, 256), (256, 256), (257, 512), (4097, 5000)):
        assert int(jax.jit(size)(jnp.int32(length))) == expected


def test_a_torch_program_that_cannot_read_lengths_reads_all(twins):
    _, torch_twin = twins
    assert torch_twin.package.fast_attention.slots_to_read(5000, None) == ((5000,), 0)
