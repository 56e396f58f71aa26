"""The laws of the cache: the old one stays, nothing leaks, and it changes no result."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils import _pytree as pytree

B, T, S = 3, 11, 19
BOUND = 1e-12

# jax compiles a call once per shape, which is faster than dispatching its operations one by one.
CALL = {
    "flax": jax.jit(lambda model, *arguments: model(*arguments)),
    "torch": lambda model, *arguments: model(*arguments),
}

examples = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@functools.cache
def model_of(gpt):
    """One model for all tests of a twin."""
    return gpt.model()


@functools.cache
def tokens_of(num_tokens=T, seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, 61, (B, num_tokens))


def empty(gpt, capacity=S, batch_size=B):
    """A cache for the shared model."""
    return gpt.package.KVCache.empty(model_of(gpt).config, batch_size, capacity)


def extend(gpt, cache, tokens, counts=None):
    """Logits of new tokens over a cache, on the host, and the longer cache."""
    counts = None if counts is None else gpt.ints(counts)
    logits, cache = CALL[gpt.name](model_of(gpt), gpt.ints(tokens), cache, counts)
    return gpt.numpy(logits), cache


def uncached(gpt, tokens):
    """Logits of whole sequences."""
    logits, _ = CALL[gpt.name](model_of(gpt), gpt.ints(tokens))
    return gpt.numpy(logits)


def held(gpt, cache):
    """Copies of all that a cache promises to keep: lengths, and keys and values below them."""
    lengths = gpt.numpy(cache.lengths_B).copy()
    parts = [lengths]
    for layer in cache.layers:
        for array in (gpt.numpy(layer.keys_BKSH), gpt.numpy(layer.values_BKSH)):
            parts += [array[b, :, :length].copy() for b, length in enumerate(lengths)]
    return parts


def assert_same_bits(found, expected):
    """Two snapshots are equal to the last bit."""
    assert len(found) == len(expected) == 1 + 2 * 2 * B
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def assert_near(found, expected):
    """Equal to rounding, and finite."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)


def prompt(gpt, counts=(7, 2, 5)):
    """A cache of ragged prompts: the first `counts` tokens of each row."""
    return extend(gpt, empty(gpt), tokens_of()[:, :7], counts)[1]


def continued(prefix_counts, tokens):
    """Each row's prompt with the new tokens right behind it, padded with zeros."""
    rows = np.zeros((B, T), int)
    for b, count in enumerate(prefix_counts):
        rows[b, :count] = tokens_of()[b, :count]
        rows[b, count : count + tokens.shape[1]] = tokens[b]
    return rows


def behind(logits, prefix_counts, num_tokens):
    """The part of uncached logits that stands at the new tokens of each row."""
    index = np.array(prefix_counts)[:, None] + np.arange(num_tokens)
    index = np.minimum(index, logits.shape[1] - 1)  # what stands nowhere is not looked at
    return np.take_along_axis(logits, index[:, :, None], axis=1)


def steps(gpt, cache, tokens):
    """Appends one token per row and call; logits at each, and the last cache."""
    outputs = []
    for t in range(tokens.shape[1]):
        logits, cache = extend(gpt, cache, tokens[:, t : t + 1])
        outputs.append(logits)
    return np.concatenate(outputs, axis=1), cache


# --- the old cache is untouched ---


def test_an_empty_cache_is_untouched_by_a_prefill(gpt):
    cache = empty(gpt)
    _, longer = extend(gpt, cache, tokens_of()[:, :7], (7, 2, 5))
    assert_same_bits(held(gpt, cache), held(gpt, empty(gpt)))
    np.testing.assert_array_equal(gpt.numpy(longer.lengths_B), (7, 2, 5))


def test_every_older_cache_is_untouched_by_all_later_steps(gpt):
    caches = [prompt(gpt)]
    before = [held(gpt, caches[0])]
    for t in range(4):
        caches.append(extend(gpt, caches[-1], tokens_of(seed=1)[:, t : t + 1])[1])
        before.append(held(gpt, caches[-1]))
    for cache, snapshot in zip(caches, before, strict=True):
        assert_same_bits(held(gpt, cache), snapshot)


def test_an_append_to_a_stale_cache_leaves_the_newer_one_untouched(gpt):
    old = prompt(gpt)
    _, new = extend(gpt, old, tokens_of(seed=1)[:, :1])
    before = held(gpt, new)
    extend(gpt, old, tokens_of(seed=2)[:, :1])
    assert_same_bits(held(gpt, new), before)


def test_a_cache_with_lengths_set_by_hand_does_not_write_into_the_first(gpt):
    cache = prompt(gpt)
    before = held(gpt, cache)
    shorter = dataclasses.replace(cache, lengths_B=gpt.ints((2, 0, 1)))
    extend(gpt, shorter, tokens_of(seed=1)[:, :1])
    assert_same_bits(held(gpt, cache), before)


# --- cached equals uncached ---


@examples
@hypothesis.given(
    plan=st.lists(
        st.tuples(
            st.sampled_from([1, 3, 7]),
            st.lists(st.integers(0, 7), min_size=B, max_size=B),
        ),
        min_size=1,
        max_size=7,
    )
)
def test_cached_equals_uncached_for_every_split_into_chunks(gpt, plan):
    tokens, cache, done = tokens_of(), empty(gpt), np.zeros(B, int)
    expected = uncached(gpt, tokens)
    for width, wanted in plan:
        counts = np.minimum(np.minimum(wanted, width), T - done)
        chunk = np.zeros((B, width), int)
        for b in range(B):
            chunk[b, : counts[b]] = tokens[b, done[b] : done[b] + counts[b]]
        logits, cache = extend(gpt, cache, chunk, counts)
        for b in range(B):
            assert_near(logits[b, : counts[b]], expected[b, done[b] : done[b] + counts[b]])
        done += counts
        np.testing.assert_array_equal(gpt.numpy(cache.lengths_B), done)


def test_single_steps_equal_one_prefill(gpt):
    outputs, cache = steps(gpt, empty(gpt), tokens_of())
    assert_near(outputs, uncached(gpt, tokens_of()))
    np.testing.assert_array_equal(gpt.numpy(cache.lengths_B), [T] * B)


def test_the_twins_hold_the_same_keys_and_values(twins):
    flax, torch = (held(gpt, prompt(gpt)) for gpt in twins)
    for x, y in zip(flax, torch, strict=True):
        assert_near(x, y)


def test_a_cache_can_be_filled_to_its_last_slot_and_to_the_end_of_the_context(gpt):
    context_length = model_of(gpt).config.context_length
    tokens = tokens_of(context_length)
    _, cache = extend(gpt, empty(gpt, context_length), tokens, [context_length - 2] * B)
    found, full = steps(gpt, cache, tokens[:, -2:])
    assert_near(found, uncached(gpt, tokens)[:, -2:])
    np.testing.assert_array_equal(gpt.numpy(full.lengths_B), [full.capacity] * B)


def test_rows_of_length_zero_and_counts_of_zero_give_finite_values(gpt):
    logits, cache = extend(gpt, empty(gpt), tokens_of()[:, :7], (0, 3, 0))
    assert np.isfinite(logits).all()
    logits, cache = extend(gpt, cache, tokens_of()[:, :7], (0, 0, 0))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(gpt.numpy(cache.lengths_B), (0, 3, 0))


def test_a_cache_may_hold_its_keys_and_values_in_another_dtype(gpt):
    config = model_of(gpt).config
    cache = gpt.package.KVCache.empty(config, B, S, dtype="float32")
    logits, cache = extend(gpt, cache, tokens_of()[:, :7])
    assert str(cache.layers[0].keys_BKSH.dtype).endswith("float32")
    assert logits.dtype == "float64"
    np.testing.assert_allclose(logits, uncached(gpt, tokens_of())[:, :7], rtol=0, atol=1e-5)


# --- nothing leaks ---


def poisoned(gpt, cache, poison):
    """The same cache with every slot beyond a row's length overwritten."""
    beyond = np.arange(S) >= gpt.numpy(cache.lengths_B)[:, None]

    def spoilt(array):
        return gpt.floats(np.where(beyond[:, None, :, None], poison, gpt.numpy(array)))

    layers = tuple(
        gpt.package.LayerCache(spoilt(layer.keys_BKSH), spoilt(layer.values_BKSH))
        for layer in cache.layers
    )
    return gpt.package.KVCache(layers, cache.lengths_B)


@pytest.mark.parametrize("poison", [np.nan, 1e30, -1e30])
def test_slots_beyond_the_length_never_leak(gpt, poison):
    clean = prompt(gpt)
    dirty = poisoned(gpt, clean, poison)
    # A chunk with padding in it, then a row that stands still, then plain steps.
    for width, counts in ((3, (3, 1, 2)), (3, (1, 0, 3)), (1, None), (1, None)):
        tokens = tokens_of(seed=width)[:, :width]
        expected, clean = extend(gpt, clean, tokens, counts)
        found, dirty = extend(gpt, dirty, tokens, counts)
        np.testing.assert_array_equal(found, expected)
    assert_same_bits(held(gpt, dirty), held(gpt, clean))


def test_garbage_reaches_no_gradient(gpt):
    clean = prompt(gpt)
    dirty = poisoned(gpt, clean, np.nan)
    tokens, counts = gpt.ints(tokens_of()[:, :3]), gpt.ints((3, 1, 2))
    found = []
    for cache in (clean, dirty):
        if gpt.name == "torch":
            model = gpt.model()
            with torch.enable_grad():
                logits, _ = model(tokens, cache, counts)
                logits.square().sum().backward()
            found.append([parameter.grad.numpy() for parameter in model.parameters()])
        else:
            graphdef, weights = nnx.split(model_of(gpt))

            def loss(weights, cache=cache, graphdef=graphdef):
                return jnp.sum(nnx.merge(graphdef, weights)(tokens, cache, counts)[0] ** 2)

            found.append([np.asarray(x) for x in jax.tree.leaves(jax.grad(loss)(weights))])
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.isfinite(one).all()


def test_what_padding_wrote_is_never_read(gpt):
    tokens = tokens_of()[:, :7]
    other = np.where(np.arange(7) < np.array([[7], [2], [5]]), tokens, tokens_of(seed=3)[:, :7])
    (_, one), (_, two) = (extend(gpt, empty(gpt), x, (7, 2, 5)) for x in (tokens, other))
    assert_same_bits(held(gpt, one), held(gpt, two))
    new = tokens_of(seed=1)[:, :3]
    np.testing.assert_array_equal(extend(gpt, one, new)[0], extend(gpt, two, new)[0])


# --- one cache, several futures ---


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_one_cache_can_be_continued_twice(gpt, order):
    cache, lengths = prompt(gpt), (7, 2, 5)
    for seed in order:
        new = tokens_of(seed=seed)[:, :3]
        found, _ = steps(gpt, cache, new)
        assert_near(found, behind(uncached(gpt, continued(lengths, new)), lengths, 3))


def test_two_continuations_may_take_turns(gpt):
    lengths, futures = (7, 2, 5), [tokens_of(seed=seed)[:, :3] for seed in (1, 2)]
    caches, outputs = [prompt(gpt)] * 2, [[], []]
    for t in range(3):
        for i, new in enumerate(futures):
            logits, caches[i] = extend(gpt, caches[i], new[:, t : t + 1])
            outputs[i].append(logits)
    for new, found in zip(futures, outputs, strict=True):
        expected = behind(uncached(gpt, continued(lengths, new)), lengths, 3)
        assert_near(np.concatenate(found, axis=1), expected)


def test_a_truncated_cache_never_read_the_tokens_it_dropped(gpt):
    longer, lengths = prompt(gpt), (3, 0, 5)
    before, new = held(gpt, longer), tokens_of(seed=1)[:, :3]
    shorter = longer.truncate(gpt.ints(lengths))
    np.testing.assert_array_equal(gpt.numpy(shorter.lengths_B), lengths)
    found, _ = extend(gpt, shorter, new)
    assert_near(found, behind(uncached(gpt, continued(lengths, new)), lengths, 3))
    assert_same_bits(held(gpt, longer), before)


def test_a_cache_goes_on_after_a_shorter_one_was_cut_from_it(gpt):
    longer, lengths = prompt(gpt), (7, 2, 5)
    steps(gpt, longer.truncate(gpt.ints((3, 0, 5))), tokens_of(seed=2)[:, :3])
    new = tokens_of(seed=1)[:, :3]
    found, _ = steps(gpt, longer, new)
    assert_near(found, behind(uncached(gpt, continued(lengths, new)), lengths, 3))


@pytest.mark.parametrize("lengths", [(8, 2, 5), (-1, 2, 5), (7, 2)])
def test_a_row_can_only_be_cut(gpt, lengths):
    message = rf"truncate: lengths \[7, 2, 5\] to \[{', '.join(map(str, lengths))}\]. Each row can"
    with pytest.raises(ValueError, match=message):
        prompt(gpt).truncate(gpt.ints(lengths))


def test_selected_rows_go_on_as_their_originals_would(gpt):
    cache, lengths, rows = prompt(gpt), np.array((7, 2, 5)), np.array((2, 0, 2))
    before, new = held(gpt, cache), tokens_of(seed=1)[:, :3]
    chosen = cache.select(gpt.ints(rows))
    np.testing.assert_array_equal(gpt.numpy(chosen.lengths_B), lengths[rows])
    found, _ = steps(gpt, chosen, new)
    sequences = continued(lengths, tokens_of(seed=1)[:, :3])[rows]
    for b, length in enumerate(lengths[rows]):
        sequences[b, length : length + 3] = new[b]
    assert_near(found, behind(uncached(gpt, sequences), lengths[rows], 3))
    assert_same_bits(held(gpt, cache), before)


def test_a_selection_may_have_fewer_or_more_rows(gpt):
    cache = prompt(gpt)
    for rows in ((1,), (0, 0, 1, 2)):
        chosen = cache.select(gpt.ints(rows))
        assert chosen.batch_size == len(rows)
        for b, row in enumerate(rows):
            for x, y in zip(chosen.layers, cache.layers, strict=True):
                found, original = gpt.numpy(x.keys_BKSH)[b], gpt.numpy(y.keys_BKSH)[row]
                np.testing.assert_array_equal(found, original)
                found, original = gpt.numpy(x.values_BKSH)[b], gpt.numpy(y.values_BKSH)[row]
                np.testing.assert_array_equal(found, original)


@pytest.mark.parametrize("rows", [(0, 3), (-1, 1)])
def test_a_row_that_does_not_exist_cannot_be_selected(gpt, rows):
    message = rf"select: rows \[{rows[0]}, {rows[1]}\] of a cache of 3. Rows count from 0"
    with pytest.raises(ValueError, match=message):
        prompt(gpt).select(gpt.ints(rows))


def test_a_grown_cache_holds_the_same_and_has_room_for_more(gpt):
    full = extend(gpt, empty(gpt, 7), tokens_of()[:, :7])[1]
    before, lengths, new = held(gpt, full), (7, 7, 7), tokens_of(seed=1)[:, :3]
    larger = full.grow(S)
    assert (full.capacity, larger.capacity) == (7, S)
    assert_same_bits(held(gpt, larger), before)
    found, _ = extend(gpt, larger, new)
    assert_near(found, behind(uncached(gpt, continued(lengths, new)), lengths, 3))
    assert_same_bits(held(gpt, full), before)


def test_a_cache_grown_by_nothing_is_still_a_value_of_its_own(gpt):
    cache, lengths = prompt(gpt), (7, 2, 5)
    same = cache.grow(S)
    steps(gpt, same, tokens_of(seed=2)[:, :3])
    new = tokens_of(seed=1)[:, :3]
    found, _ = steps(gpt, cache, new)
    assert_near(found, behind(uncached(gpt, continued(lengths, new)), lengths, 3))


def test_a_cache_never_shrinks(gpt):
    with pytest.raises(ValueError, match=r"grow: capacity 19 to 18. A cache only grows"):
        empty(gpt).grow(S - 1)


# --- no room ---


def test_more_tokens_than_slots_are_refused_and_nothing_is_written(gpt):
    cache, model = extend(gpt, empty(gpt, 8), tokens_of()[:, :7], (7, 2, 5))[1], model_of(gpt)
    before = held(gpt, cache)
    message = r"KVCache: row 0 holds 7 tokens \+ 3 new = 10 > capacity 8. .* Call grow first"
    with pytest.raises(ValueError, match=message):
        model(gpt.ints(tokens_of()[:, :3]), cache)
    assert_same_bits(held(gpt, cache), before)


def test_only_real_tokens_need_slots(gpt):
    cache, model = extend(gpt, empty(gpt, 8), tokens_of()[:, :7], (7, 2, 5))[1], model_of(gpt)
    message = r"row 2 holds 5 tokens \+ 4 new = 9 > capacity 8"
    with pytest.raises(ValueError, match=message):
        model(gpt.ints(tokens_of()[:, :7]), cache, gpt.ints((1, 3, 4)))
    logits, _ = extend(gpt, cache, tokens_of()[:, :7], (1, 6, 3))
    assert np.isfinite(logits).all()


def test_more_tokens_than_positions_are_refused(gpt):
    context_length, model = model_of(gpt).config.context_length, model_of(gpt)
    cache = extend(gpt, empty(gpt, context_length + 2), tokens_of(context_length - 1))[1]
    message = r"row 0 holds 28 tokens \+ 2 new = 30 > context_length 29. .* Call truncate first"
    with pytest.raises(ValueError, match=message):
        model(gpt.ints(tokens_of()[:, :2]), cache)


@pytest.mark.parametrize("counts", [(3, 4, 3), (3, -1, 3)])
def test_counts_that_the_call_does_not_have_are_refused(gpt, counts):
    # Otherwise the lengths move past the real tokens, and garbage counts as held.
    with pytest.raises(ValueError, match=f"counts?.*{counts[1]}"):
        model_of(gpt)(gpt.ints(tokens_of()[:, :3]), prompt(gpt), gpt.ints(counts))


def test_a_prefill_of_an_empty_row_is_refused(gpt):
    with pytest.raises(ValueError, match=r"counts \[3, 0, 3\] .* from 1 to 3 real ones"):
        gpt.package.prefill(
            model_of(gpt), gpt.ints(tokens_of()[:, :3]), empty(gpt), gpt.ints((3, 0, 3))
        )


def test_dropout_through_a_cache_is_refused(gpt):
    with pytest.raises(ValueError, match=r"a key and a cache\. Dropout is for training"):
        model_of(gpt)(gpt.ints(tokens_of()[:, :3]), empty(gpt), key=gpt.random.key(0))


def test_a_negative_id_never_reads_another_tokens_row(gpt):
    tokens = gpt.ints([[-1], [-1], [-1]])
    if gpt.name == "torch":
        with pytest.raises(IndexError):
            model_of(gpt)(tokens, prompt(gpt))
    else:
        assert np.isnan(np.asarray(model_of(gpt)(tokens, prompt(gpt))[0])).all()


def test_the_lengths_that_truncate_was_given_can_change_afterwards(twins):
    _, gpt = twins
    lengths = gpt.ints((2, 0, 1))
    cut = prompt(gpt).truncate(lengths)
    lengths += 1
    assert cut.lengths_B.tolist() == [2, 0, 1]


def test_a_cache_for_another_number_of_rows_is_refused(gpt):
    with pytest.raises(ValueError, match=r"\b3\b.*\b1\b"):
        model_of(gpt)(gpt.ints(tokens_of()[:, :3]), empty(gpt, batch_size=1))


def test_a_compiled_call_without_room_gives_nan_to_the_tokens_that_overflow(twins):
    flax, _ = twins
    tokens, lengths, new = tokens_of(), (7, 2, 5), tokens_of(seed=1)[:, :3]
    cache = extend(flax, empty(flax, 8), tokens[:, :7], lengths)[1]
    before = held(flax, cache)
    found, overflown = extend(flax, cache, new)
    expected = behind(uncached(flax, continued(lengths, new)), lengths, 3)
    assert np.isnan(found[0, 1:]).all()
    assert_near(found[0, :1], expected[0, :1])
    assert_near(found[1:], expected[1:])
    assert_same_bits(held(flax, cache), before)
    for x, y in zip(held(flax, overflown.truncate(flax.ints(lengths))), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_compiled_call_past_the_context_gives_nan_to_the_tokens_that_overflow(twins):
    flax, _ = twins
    context_length = model_of(flax).config.context_length
    tokens, lengths = tokens_of(context_length), (context_length - 1, 2, 5)
    cache = extend(flax, empty(flax, context_length + 5), tokens, lengths)[1]
    # The next three of every row; the first row has one position left.
    new = np.stack([np.resize(row[n:], 3) for row, n in zip(tokens, lengths, strict=True)])
    found, _ = extend(flax, cache, new)
    expected = uncached(flax, tokens)
    assert np.isnan(found[0, 1:]).all()
    assert_near(found[0, :1], expected[0, -1:])
    assert_near(found[1:], behind(expected, lengths, 3)[1:])


# --- allocation ---


def test_an_empty_cache_has_the_shapes_and_zeros_it_says(gpt):
    config, cache = model_of(gpt).config, empty(gpt)
    assert (cache.batch_size, cache.capacity, len(cache.layers)) == (B, S, config.num_layers)
    for layer in cache.layers:
        for array in (gpt.numpy(layer.keys_BKSH), gpt.numpy(layer.values_BKSH)):
            assert array.shape == (B, config.num_heads, S, config.head_width)
            assert array.dtype == config.dtype
            assert not array.any()
    np.testing.assert_array_equal(gpt.numpy(cache.lengths_B), [0] * B)


@pytest.mark.parametrize("batch_size, capacity", [(0, 7), (3, 0), (-1, -1)])
def test_a_cache_without_a_row_or_a_slot_is_refused(gpt, batch_size, capacity):
    message = f"KVCache.empty: batch size {batch_size}, capacity {capacity}. Both must be at least"
    with pytest.raises(ValueError, match=message):
        gpt.package.KVCache.empty(gpt.config(), batch_size, capacity)


@pytest.mark.parametrize("dtype, itemsize", [(None, 8), ("float32", 4)])
def test_bytes_count_every_slot_and_the_valid_ones(gpt, dtype, itemsize):
    config, lengths = model_of(gpt).config, np.array((7, 2, 5))
    empty = gpt.package.KVCache.empty(config, B, S, dtype)
    cache = gpt.package.KVCache(empty.layers, gpt.ints(lengths))
    slot = 2 * config.num_layers * config.num_heads * config.head_width * itemsize
    assert cache.num_bytes == gpt.package.cache.CacheBytes(B * S * slot, lengths.sum() * slot)
    assert empty.num_bytes.valid == 0


# --- a cache is a tree of arrays ---


def tree_map(gpt, function, cache):
    """The framework's own map over the leaves of a tree."""
    return (jax.tree.map if gpt.name == "flax" else pytree.tree_map)(function, cache)


def test_a_cache_goes_through_its_frameworks_trees(gpt):
    cache = prompt(gpt)
    leaves = jax.tree.leaves(cache) if gpt.name == "flax" else pytree.tree_leaves(cache)
    assert len(leaves) == 2 * len(cache.layers) + 1
    copied = tree_map(gpt, lambda leaf: leaf + 0, cache)
    assert type(copied) is type(cache) and type(copied.layers[0]) is type(cache.layers[0])
    assert_same_bits(held(gpt, copied), held(gpt, cache))


def test_a_mapped_cache_may_not_write_into_the_first(gpt):
    cache, lengths, new = prompt(gpt), (7, 2, 5), tokens_of(seed=1)[:, :3]
    mapped = tree_map(gpt, lambda leaf: leaf, cache)
    steps(gpt, mapped, tokens_of(seed=2)[:, :3])
    found, longer = extend(gpt, cache, new[:, :1])
    extend(gpt, mapped, tokens_of(seed=3)[:, :1])
    rest, _ = steps(gpt, longer, new[:, 1:])
    expected = behind(uncached(gpt, continued(lengths, new)), lengths, 3)
    assert_near(np.concatenate([found, rest], axis=1), expected)


# --- torch makes the value cheap by ownership ---


def addresses(cache):
    """Where the keys and values of a torch cache lie."""
    return [x.data_ptr() for layer in cache.layers for x in (layer.keys_BKSH, layer.values_BKSH)]


def test_the_newest_torch_cache_writes_in_place(twins):
    _, gpt = twins
    caches = [empty(gpt)]
    for _ in range(3):
        caches.append(extend(gpt, caches[-1], tokens_of()[:, :1])[1])
    assert all(addresses(cache) == addresses(caches[0]) for cache in caches)


def test_a_shorter_torch_cache_leaves_the_longer_one_its_slots(twins):
    _, gpt = twins
    cache = prompt(gpt)
    extend(gpt, cache.truncate(gpt.ints((3, 0, 5))), tokens_of()[:, :1])
    _, longer = extend(gpt, cache, tokens_of()[:, :1])
    assert addresses(longer) == addresses(cache)


@pytest.mark.parametrize("derive", ["stale", "truncated", "mapped"])
def test_a_torch_cache_that_owns_nothing_copies_once_and_then_owns_the_copy(twins, derive):
    _, gpt = twins
    cache = prompt(gpt)
    if derive == "stale":
        extend(gpt, cache, tokens_of()[:, :1])
    elif derive == "truncated":
        cache = cache.truncate(gpt.ints((3, 0, 5)))
    else:
        cache = tree_map(gpt, lambda leaf: leaf, cache)
    _, copied = extend(gpt, cache, tokens_of()[:, :1])
    assert not set(addresses(cache)) & set(addresses(copied))
    _, longer = extend(gpt, copied, tokens_of()[:, :1])
    assert addresses(longer) == addresses(copied)


@pytest.mark.parametrize("derive", ["selected", "grown"])
def test_a_torch_cache_in_slots_of_its_own_writes_in_place(twins, derive):
    _, gpt = twins
    first = prompt(gpt)
    cache = first.select(gpt.ints((2, 0, 1))) if derive == "selected" else first.grow(S + 4)
    assert not set(addresses(first)) & set(addresses(cache))
    _, longer = extend(gpt, cache, tokens_of()[:, :1])
    assert addresses(longer) == addresses(cache)


# Names of the weights that are trained: all, or only those behind the keys or the values.
TRAINED = pytest.mark.parametrize(
    "trained", ["", "attention.key", "attention.value", "attention.query"]
)


def trainable(gpt, trained):
    """A torch model in which only weights of that name have gradients."""
    model = gpt.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    return model


def gradients(model, logits):
    """Gradients of a sum that no symmetry makes zero."""
    weights = torch.cos(torch.arange(61, dtype=torch.float64))
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.requires_grad}


@TRAINED
def test_gradients_flow_through_two_torch_appends(twins, trained):
    _, gpt = twins
    model, tokens = trainable(gpt, trained), gpt.ints(tokens_of()[:, :7])
    with torch.enable_grad():
        expected = gradients(model, model(tokens)[0])
        first, cache = model(tokens[:, :4], empty(gpt))
        second, _ = model(tokens[:, 4:], cache)
        found = gradients(model, torch.cat([first, second], dim=1))
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, gradient in found.items():
        assert_near(gradient, expected[name])


@TRAINED
def test_an_old_torch_cache_takes_no_part_in_a_backward_graph(twins, trained):
    _, gpt = twins
    model, tokens, cache = trainable(gpt, trained), gpt.ints(tokens_of()[:, :7]), prompt(gpt)
    with torch.enable_grad():
        once = gradients(model, model(tokens, cache)[0])
        twice = gradients(model, model(tokens, cache)[0])
    for layer in cache.layers:
        assert not layer.keys_BKSH.requires_grad and not layer.values_BKSH.requires_grad
    for name, gradient in once.items():
        assert_near(twice[name], gradient)


def test_torch_appends_with_gradients_copy(twins):
    _, gpt = twins
    model, tokens, caches = gpt.model(), gpt.ints(tokens_of()[:, :1]), [empty(gpt)]
    with torch.enable_grad():
        for _ in range(2):
            caches.append(model(tokens, caches[-1])[1])
    one, two, three = map(addresses, caches)
    assert not set(one) & set(two) and not set(two) & set(three)


def test_a_torch_step_without_gradients_leaves_the_backward_graph_of_its_cache_alone(twins):
    _, gpt = twins
    model, tokens = gpt.model(), gpt.ints(tokens_of()[:, :7])
    with torch.enable_grad():
        logits, cache = model(tokens, empty(gpt))
    model(tokens[:, :1], cache)
    with torch.enable_grad():
        logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_torch_cache_made_in_inference_mode_goes_on_outside_of_it(twins):
    _, gpt = twins
    lengths, new = (7, 2, 5), tokens_of(seed=1)[:, :3]
    with torch.inference_mode():
        inside = prompt(gpt)
    before = held(gpt, inside)
    found, outside = extend(gpt, inside, new[:, :1])
    rest, _ = steps(gpt, outside, new[:, 1:])
    expected = behind(uncached(gpt, continued(lengths, new)), lengths, 3)
    assert_near(np.concatenate([found, rest], axis=1), expected)
    assert not set(addresses(inside)) & set(addresses(outside))
    assert_same_bits(held(gpt, inside), before)


def test_a_torch_cache_made_outside_goes_on_in_inference_mode(twins):
    _, gpt = twins
    lengths, new = (7, 2, 5), tokens_of(seed=1)[:, :3]
    cache = prompt(gpt)
    with torch.inference_mode():
        found, longer = steps(gpt, cache, new)
        assert_near(found, behind(uncached(gpt, continued(lengths, new)), lengths, 3))
    assert addresses(longer) == addresses(cache)


# --- jax makes the value cheap by donation ---


def test_a_donated_flax_cache_gives_the_same_logits_and_is_gone(twins):
    flax, _ = twins
    donating = jax.jit(lambda model, tokens, cache: model(tokens, cache), donate_argnums=2)
    kept, given = prompt(flax), prompt(flax)
    for t in range(3):
        tokens = tokens_of(seed=1)[:, t : t + 1]
        expected, kept = extend(flax, kept, tokens)
        logits, longer = donating(model_of(flax), flax.ints(tokens), given)
        assert_near(flax.numpy(logits), expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        given = longer
    for x, y in zip(held(flax, given), held(flax, kept), strict=True):
        assert_near(x, y)
