"""Every kind of position, of heads and of window, in both twins: one function, with and without a
cache, in one call or many, for rows of one length or of their own."""

import itertools

import numpy as np
import pytest

from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.weights.randomize import randomized
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant

BOUND = 1e-12
B, T, S = 4, 17, 21
COUNTS = np.array((T, 9, 1, T))
WIDTHS = 6, 1  # of calls, few different ones, for each is compiled
CHUNKS = 6, 1, 1, 6, 1, 1, 1
# All different, and the head is not the stream divided by the heads. A block's other parts take
# turns, so that each is met in some cell.
SIZES = dict(vocab_size=61, context_length=23, embed_dim=15, num_layers=2, num_heads=6, head_dim=4,
             mlp_dim=13)  # fmt: skip
POSITIONS = {
    "learned": dict(norm="layer", activation="gelu_tanh"),
    "rotary": dict(norm="rms", activation="silu", gated=True, tied_head=False, qkv_bias=False,
                   out_bias=False, mlp_bias=False, rotary=dict(base=100.0, fraction=0.5)),
    "alibi": dict(norm="layer", activation="gelu_bloom", embedding_norm=True),
    "t5": dict(norm="rms_plus_one", activation="gelu", gated=True, t5_buckets=6, t5_max_distance=9,
               tied_head=False, mlp_bias=False),
    "none": dict(norm="rms", qk_norm="head", out_bias=False, activation="silu"),
}  # fmt: skip
KV_HEADS = {"MHA": 6, "GQA": 2, "MQA": 1}
WINDOWS = {"no window": dict(), "window": dict(window=5, num_full_layers=1)}
CELLS = list(itertools.product(POSITIONS, KV_HEADS, WINDOWS))
ROPES = {
    "half": dict(fraction=0.5),
    "linear": dict(scaling="linear", factor=3.0),
    "llama3": dict(scaling="llama3", factor=4.0, original_length=8, base=50.0, high_frequency=2.5),
    "dynamic": dict(scaling="dynamic", factor=2.0, original_length=8),
}

# Each part that is not among the above at least once, as models mix them.
PARTS = {
    "norms before and after, caps": dict(
        norm="rms_plus_one", norm_place="both", score_cap=2.0, logit_cap=1.5, embedding_scale=3.0,
        attention_scale=0.3, layers=[dict(window=5), dict(rotary=ROPES["linear"])], gated=True,
    ),
    "norms after, yarn": dict(
        norm="rms", norm_place="after", qk_norm="width",
        layers=[dict(window=5), dict(rotary=dict(
            scaling="yarn", factor=4.0, original_length=8, high_frequency=2.0, low_frequency=0.3,
            base=50.0, attention_factor=1.1, whole_pairs=False))],
    ),
    "no positions, factors": dict(
        norm="rms", layers=[dict(), dict(positions="none")], residual_scale=0.5, logit_scale=0.2,
        activation="relu_squared",
    ),
    "parallel, one norm": dict(
        norm="layer_no_bias", residual="parallel_one_norm", activation="relu", logit_scale=3.0
    ),
    "experts": dict(
        norm="rms", gated=True, activation="silu_clamped", layers=[dict(dense=True), dict()],
        experts=dict(num_experts=5, num_chosen=2, width=7, router_bias=True),
    ),
    "experts, one shared": dict(
        gated=True, activation="silu", mlp_bias=False, experts=dict(
            num_experts=5, num_chosen=3, width=7, router="sigmoid", scale=1.7, shared_width=9,
            shared_gate=True, renormalise=False),
    ),
    "parallel, sinks, longrope": dict(
        residual="parallel", sinks=True, rotary=dict(
            scaling="longrope", short_factors=[1.0, 2.0], long_factors=[3.0, 7.0],
            original_length=9, attention_factor=1.2),
    ),
}  # fmt: skip


def pair_of(twins, **changes):
    """Both twins with the same random numbers in every leaf."""
    flax, torch = (gpt.package.GPT(gpt.config(**(SIZES | changes))) for gpt in twins)
    load_flax(flax, randomized(flax_leaves(flax), 1))
    transplant(flax, torch, TWINS)
    return list(zip(twins, (flax, torch), strict=True))


def cell(name, heads, window):
    return POSITIONS[name] | dict(positions=name, num_kv_heads=KV_HEADS[heads]) | WINDOWS[window]


def tokens_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (B, T))


def in_pieces(gpt, model, tokens, seed):
    """Logits of a cache that is read in calls in which rows have random numbers of tokens, but the
    last row has all there is room for; NaN where there is no token."""
    rng = np.random.default_rng(seed)
    cache = gpt.package.KVCache.empty(model.config, B, S)
    found = np.full((B, T, SIZES["vocab_size"]), np.nan)
    done = np.zeros(B, int)
    while np.any(done < COUNTS):
        width = int(rng.choice(WIDTHS))
        wanted = rng.integers(0, width + 1, B)
        wanted[-1] = width
        taken = np.minimum(COUNTS - done, wanted)
        part = rng.integers(0, SIZES["vocab_size"], (B, width))
        for row in range(B):
            part[row, : taken[row]] = tokens[row, done[row] : done[row] + taken[row]]
        logits, cache = model(gpt.ints(part), cache, gpt.ints(taken))
        for row in range(B):
            found[row, done[row] : done[row] + taken[row]] = gpt.numpy(logits)[row, : taken[row]]
        done += taken
    return found


@pytest.mark.parametrize("name, heads, window", CELLS)
def test_the_twins_agree_with_and_without_a_cache(twins, name, heads, window):
    tokens, whole = tokens_of(), []
    real = np.arange(T) < COUNTS[:, None]
    for gpt, model in pair_of(twins, **cell(name, heads, window)):
        whole.append(gpt.numpy(model(gpt.ints(tokens))[0]))
        ragged = gpt.numpy(model(gpt.ints(tokens), None, gpt.ints(COUNTS))[0])
        empty = gpt.package.KVCache.empty(model.config, B, S)
        at_once, cache = model(gpt.ints(tokens), empty)
        assert gpt.numpy(cache.layers[0].keys_BKSH).shape == (B, KV_HEADS[heads], S, 4)
        np.testing.assert_allclose(gpt.numpy(at_once), whole[-1], rtol=0, atol=BOUND)
        start, cache = 0, empty
        for width in CHUNKS:
            part = gpt.ints(tokens[:, start : start + width])
            logits, cache = model(part, cache)
            expected = whole[-1][:, start : start + width]
            np.testing.assert_allclose(gpt.numpy(logits), expected, rtol=0, atol=BOUND)
            start += width
        for found in (ragged, in_pieces(gpt, model, tokens, 1)):
            np.testing.assert_allclose(found[real], whole[-1][real], rtol=0, atol=BOUND)
    assert whole[0].std() > 0.3
    np.testing.assert_allclose(*whole, rtol=0, atol=BOUND)


@pytest.mark.parametrize("scaling", ROPES)
def test_scaled_rotations_agree_and_a_cached_key_stays_right(twins, scaling):
    config = dict(positions="rotary", rotary=ROPES[scaling], num_kv_heads=2, head_dim=8)
    tokens, whole = tokens_of(), []
    for gpt, model in pair_of(twins, **config):
        whole.append(gpt.numpy(model(gpt.ints(tokens))[0]))
        found, real = in_pieces(gpt, model, tokens, 3), np.arange(T) < COUNTS[:, None]
        np.testing.assert_allclose(found[real], whole[-1][real], rtol=0, atol=BOUND)
    np.testing.assert_allclose(*whole, rtol=0, atol=BOUND)
    (gpt, plain), _ = pair_of(twins, **(config | dict(rotary=dict())))
    assert np.abs(gpt.numpy(plain(gpt.ints(tokens))[0]) - whole[0]).max() > 1e-3


@pytest.mark.parametrize("name", PARTS)
def test_parts_agree_with_and_without_a_cache(twins, name):
    tokens, whole, real = tokens_of(), [], np.arange(T) < COUNTS[:, None]
    changes = dict(positions="rotary", num_kv_heads=2) | PARTS[name]
    for gpt, model in pair_of(twins, **changes):
        whole.append(gpt.numpy(model(gpt.ints(tokens))[0]))
        found = in_pieces(gpt, model, tokens, 3)
        np.testing.assert_allclose(found[real], whole[-1][real], rtol=0, atol=BOUND)
        decoder = gpt.package.Decoder(model, B)
        logits, cache = decoder.prefill(gpt.ints(tokens[:, :-1]))
        logits, _ = decoder.advance(gpt.ints(tokens[:, -1]), cache)
        np.testing.assert_allclose(gpt.numpy(logits), whole[-1][:, -1], rtol=0, atol=BOUND)
    assert whole[0].std() > 0.1
    np.testing.assert_allclose(*whole, rtol=0, atol=BOUND)


@pytest.mark.parametrize("part, without", [
    (dict(score_cap=2.0), dict()), (dict(logit_cap=1.5), dict()), (dict(sinks=True), dict()),
    (dict(embedding_scale=3.0), dict()), (dict(residual_scale=0.5), dict()),
    (dict(attention_scale=0.3), dict()), (dict(logit_scale=0.5), dict()),
    (dict(norm_place="both", norm="rms"), dict(norm="rms")),
    (dict(residual="parallel"), dict()), (dict(layers=[dict(), dict(window=3)]), dict()),
    (dict(layers=[dict(), dict(positions="none")]), dict()),
    (dict(norm="rms", qk_norm="width"), dict(norm="rms")),
])  # fmt: skip
def test_a_part_changes_what_a_model_computes(twins, part, without):
    found = []
    for changes in (part, without):
        gpt, model = pair_of(twins, **(dict(positions="rotary", num_kv_heads=2) | changes))[1]
        found.append(gpt.numpy(model(gpt.ints(tokens_of()))[0]))
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("name", POSITIONS)
def test_what_lies_in_free_slots_or_behind_the_window_is_never_seen(twins, name):
    tokens = tokens_of()
    for gpt, model in pair_of(twins, **cell(name, "GQA", "window")):
        cache = gpt.package.KVCache.empty(model.config, B, S)
        _, cache = model(gpt.ints(tokens), cache, gpt.ints(COUNTS))
        expected = gpt.numpy(model(gpt.ints(tokens[:, :2]), cache)[0])
        for poison in (np.nan, 1e30):
            layers = []
            for index, layer in enumerate(cache.layers):
                slots = np.arange(S)[None, :]
                free = slots >= COUNTS[:, None]
                if index >= model.config.num_full_layers:
                    free |= slots < COUNTS[:, None] - model.config.window + 1
                parts = [gpt.numpy(x).copy() for x in (layer.keys_BKSH, layer.values_BKSH)]
                for part in parts:
                    part[np.broadcast_to(free[:, None, :], part.shape[:3])] = poison
                layers.append(gpt.package.LayerCache(*map(gpt.floats, parts)))
            poisoned = gpt.package.KVCache(tuple(layers), cache.lengths_B)
            found = gpt.numpy(model(gpt.ints(tokens[:, :2]), poisoned)[0])
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["rotary", "alibi", "t5"])
def test_a_compiled_decoder_writes_what_the_model_writes_without_a_cache(twins, name):
    prompts, written = tokens_of()[:, :7], []
    for gpt, model in pair_of(twins, **cell(name, "GQA", "window")):
        counts = gpt.ints((7, 4, 1, 7))
        decoder = gpt.package.Decoder(model, B)
        for use_cache in (True, False):
            generation = gpt.package.generate(
                decoder, gpt.ints(prompts), 9, counts, use_cache=use_cache
            )
            written.append(gpt.numpy(generation.tokens_BG))
        single = gpt.package.Decoder(model, 1)  # laid out in another way
        alone = gpt.package.generate(single, gpt.ints(prompts[1:2, :4]), 9)
        np.testing.assert_array_equal(gpt.numpy(alone.tokens_BG), written[-1][1:2])
    for tokens in written[1:]:
        np.testing.assert_array_equal(tokens, written[0])
    assert len(np.unique(written[0])) > 3


@pytest.mark.parametrize("name", ["rotary", "alibi", "t5"])
def test_a_batch_invariant_cache_gives_the_same_bits_for_every_kind_of_position(twins, name):
    tokens = tokens_of()[:1]
    for gpt, model in pair_of(twins, **cell(name, "GQA", "window")):
        found = []
        for cuts in ((T,), (5, 1, 11)):
            cache, start = gpt.package.BatchInvariantCache.empty(model.config, 1, S), 0
            for width in cuts:
                part = gpt.ints(tokens[:, start : start + width])
                module = gpt.package.decoding.batch_invariant
                logits, cache = module.prefill(model, part, cache)
                start += width
            found.append(gpt.numpy(logits))
        np.testing.assert_array_equal(*found)


def test_a_query_head_reads_the_kv_head_of_its_group(gpt):
    """Two kv heads and six query heads: the first three read the first."""
    model = gpt.model(**(SIZES | dict(num_kv_heads=2, num_layers=1)))
    cache = gpt.package.KVCache.empty(model.config, 1, S)
    _, cache = model(gpt.ints(tokens_of()[:1]), cache)
    heard = []

    def recording(q_BKQTH, new, past, metadata, drop):
        values, layer = gpt.package.attention.attend(q_BKQTH, new, past, metadata, drop)
        heard.append(gpt.numpy(values))
        return values, layer

    model.with_attend(recording)(gpt.ints(tokens_of()[:1]))
    ((weights_BNTS,), (found_BKQTH,)) = model.attention_maps(gpt.ints(tokens_of()[:1])), heard
    weights_BNTS = gpt.numpy(weights_BNTS)
    assert weights_BNTS.shape == (1, 6, T, T) and found_BKQTH.shape == (1, 2, 3, T, 4)
    values_BKSH = gpt.numpy(cache.layers[0].values_BKSH)[:, :, :T]
    for head in range(6):
        expected = weights_BNTS[:, head] @ values_BKSH[:, head // 3]
        np.testing.assert_allclose(found_BKQTH[:, head // 3, head % 3], expected, atol=BOUND)


def test_a_row_that_overflows_under_jit_is_nan_without_a_position_table():
    import jax
    import jax.numpy as jnp

    import flax_gpt

    config = flax_gpt.GPTConfig(**(SIZES | dict(positions="alibi", dtype="float32")))
    model = flax_gpt.GPT(config, flax_gpt.random.key(0))
    cache = flax_gpt.KVCache.empty(config, 2, 4)
    cache = flax_gpt.KVCache(cache.layers, jnp.asarray([4, 1]))
    step = jax.jit(lambda cache: flax_gpt.decode_step(model, jnp.asarray([1, 2]), cache)[0])
    logits = np.asarray(step(cache))
    assert np.all(np.isnan(logits[0])) and np.all(np.isfinite(logits[1]))
