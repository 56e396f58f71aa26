"""A cache in a file is the same cache to both twins, and nothing to any other model."""

import dataclasses
import functools

import numpy as np
import pytest
from safetensors.torch import load_file

from parity.weights.tables import TWINS
from parity.weights.transplant import transplant

B, T = 3, 7
COUNTS = (7, 2, 5)
TOKENS = np.random.default_rng(0).integers(0, 61, (B, T))
# Weights of every kind and name.
KINDS = [
    dict(positions="t5", norm="rms", gated=True),
    dict(positions="rotary", num_kv_heads=1, head_dim=4),
    dict(positions="learned", dtype="bfloat16"),
]


@functools.cache
def pair(flax, torch, **changes):
    """The twins with the same bits for weights; a seed gives the same but for rounding."""
    models = flax.model(seed=3, **changes), torch.model(seed=3, **changes)
    transplant(*reversed(models), TWINS)
    return models


def filled(gpt, model):
    """A cache with garbage after its rows."""
    cache = gpt.package.KVCache.empty(model.config, B, 16)
    return gpt.package.prefill(model, gpt.ints(TOKENS), cache, gpt.ints(COUNTS))[1]


def held(gpt, cache):
    """What the rows hold, on the host."""
    real = np.arange(T)[None, :] < np.array(COUNTS)[:, None]
    return [
        gpt.numpy(x)[:, :, :T].swapaxes(1, 2)[real]
        for layer in cache.layers
        for x in (layer.keys_BKSH, layer.values_BKSH)
    ]


@pytest.mark.parametrize("writer, reader", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_a_cache_is_read_bit_for_bit_by_both_twins(twins, writer, reader, tmp_path):
    models, path = pair(*twins), tmp_path / "story.cache"
    one, two = twins[writer], twins[reader]
    cache = filled(one, models[writer])
    one.package.save_cache(path, models[writer], cache, one.ints(TOKENS))
    found, tokens = two.package.load_cache(path, models[reader], capacity=12)
    assert found.capacity == 12
    np.testing.assert_array_equal(two.numpy(found.lengths_B), COUNTS)
    np.testing.assert_array_equal(tokens[0], TOKENS[0])
    assert not tokens[1, 2:].any()
    for before, after in zip(held(one, cache), held(two, found), strict=True):
        np.testing.assert_array_equal(before, after)
    step = two.package.decode_step(models[reader], two.ints([1, 2, 3]), found)[0]
    expected = one.package.decode_step(models[writer], one.ints([1, 2, 3]), cache)[0]
    np.testing.assert_allclose(two.numpy(step), one.numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", KINDS, ids=lambda x: x["positions"])
def test_the_digest_of_weights_is_that_of_both_twins(twins, changes):
    digests = {
        gpt.package.weights_digest(model)
        for gpt, model in zip(twins, pair(*twins, **changes), strict=True)
    }
    assert len(digests) == 1
    other = twins[1].model(seed=4, **changes)
    assert twins[1].package.weights_digest(other) not in digests


def test_a_cache_of_another_model_is_refused_in_one_line(gpt, tmp_path):
    model, path = gpt.model(seed=3), tmp_path / "story.cache"
    gpt.package.save_cache(path, model, filled(gpt, model), gpt.ints(TOKENS))
    refused = [
        (gpt.model(seed=4), "its weights are others"),
        (gpt.model(seed=3, window=5), "its window is None, here 5"),
        (gpt.model(seed=3, num_layers=1), "its num_layers is 2, here 1"),
    ]
    for other, message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            gpt.package.load_cache(path, other)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cannot be read .* It is missing or damaged. Save"):
        gpt.package.load_cache(path, model)
    with pytest.raises(ValueError, match="cannot be read"):
        gpt.package.load_cache(tmp_path / "none", model)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_tokens_that_are_not_those_of_the_cache_are_refused(gpt, tmp_path):
    model = gpt.model(seed=3)
    cache = filled(gpt, model)
    with pytest.raises(ValueError, match=r"save_cache: tokens of shape \(3, 6\), and rows that"):
        gpt.package.save_cache(tmp_path / "x", model, cache, gpt.ints(TOKENS[:, :6]))


def test_garbage_after_the_rows_does_not_reach_the_file(gpt, tmp_path):
    model = gpt.model(seed=3)
    cache = filled(gpt, model)
    free = np.arange(16) >= np.array(COUNTS)[:, None]

    def spoiled(x):
        return gpt.floats(np.where(free[:, None, :, None], np.nan, gpt.numpy(x)))

    layers = [
        gpt.package.LayerCache(spoiled(layer.keys_BKSH), spoiled(layer.values_BKSH))
        for layer in cache.layers
    ]
    dirty = dataclasses.replace(cache, layers=tuple(layers))
    for name, value in (("a", cache), ("b", dirty)):
        gpt.package.save_cache(tmp_path / name, model, value, gpt.ints(TOKENS))
    one, two = (load_file(tmp_path / name) for name in "ab")
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(x.numpy(), two[name].numpy(), name)
