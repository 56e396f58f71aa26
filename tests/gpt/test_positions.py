"""The kinds of positions, each against its definition."""

import dataclasses

import numpy as np
import pytest

KINDS = dict(learned="Learned", rotary="Rotary", alibi="Alibi", t5="T5", none="NoPositions")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_a_value_that_a_compiler_can_compare(gpt, name):
    config = gpt.config(positions=name, head_dim=4)
    found = gpt.package.build.positions(config)
    assert type(found).__name__ == KINDS[name]
    assert found == gpt.package.build.positions(config)
    assert hash(found) == hash(gpt.package.build.positions(config))
    assert [found] != [
        gpt.package.build.positions(gpt.config(positions=x, head_dim=4)) for x in KINDS if x != name
    ][:1]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 16])
def test_alibi_slopes_fall_by_one_factor_and_fill_up_from_the_next_power(gpt, heads):
    slopes = gpt.package.positions.alibi_slopes(heads)
    power = 2 ** int(np.log2(heads))
    assert slopes.shape == (heads,) and len(set(slopes)) == heads
    np.testing.assert_allclose(slopes[:power], [2 ** (-8 * n / power) for n in range(1, power + 1)])
    twice = [2 ** (-8 * n / (2 * power)) for n in range(1, 2 * power + 1)]
    np.testing.assert_allclose(slopes[power:], twice[0::2][: heads - power])


def test_t5_buckets_are_exact_for_near_tokens_and_logarithmic_for_far_ones(gpt):
    buckets = gpt.package.positions.t5_buckets(32, 128)
    assert buckets[:16].tolist() == list(range(16)) and buckets[-1] == 31
    assert np.all(np.diff(buckets) >= 0) and set(buckets) == set(range(32))
    # Raffel et al.: distance 16 * 8 ** (n / 16) begins the nth of the logarithmic ones.
    assert [int(np.argmax(buckets == 16 + n)) for n in (1, 8, 15)] == [19, 46, 113]


def test_t5_scores_and_slopes_are_those_of_transformers(gpt):
    import torch
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.t5.modeling_t5 import T5Attention

    buckets = gpt.package.positions.t5_buckets(32, 128)
    theirs = T5Attention._relative_position_bucket(-torch.arange(129), bidirectional=False)
    np.testing.assert_array_equal(buckets, theirs.numpy())
    for heads in (1, 2, 3, 5, 6, 8, 12, 20):
        theirs = np.ravel(_get_alibi_slopes(heads, "cpu").numpy())
        np.testing.assert_allclose(gpt.package.positions.alibi_slopes(heads), theirs, rtol=1e-6)


def test_a_turn_changes_no_length_and_only_distances_matter(gpt):
    """q at p and k at s multiply to what they do at p + 3 and s + 3."""
    config = gpt.config(positions="rotary", head_dim=8, num_heads=1)
    rng = np.random.default_rng(0)
    q, k = (gpt.floats(rng.standard_normal((1, 5, 1, 8))) for _ in range(2))
    positions = gpt.package.build.positions(config)

    def product(shift):
        tokens = gpt.ints(np.zeros((1, 5)))
        metadata = gpt.package.metadata.attention_metadata(tokens, None, None, 5)
        places = gpt.ints(np.arange(5)[None] + shift)
        metadata = positions.prepare(dataclasses.replace(metadata, positions_BT=places), None)
        turned = [gpt.numpy(positions.rotate(x, metadata))[0, :, 0] for x in (q, k)]
        np.testing.assert_allclose(
            np.linalg.norm(turned[0], axis=-1), np.linalg.norm(gpt.numpy(q)[0, :, 0], axis=-1)
        )
        return turned[0] @ turned[1].T

    np.testing.assert_allclose(product(0), product(3), atol=1e-13)
    assert np.abs(product(0) - gpt.numpy(q)[0, :, 0] @ gpt.numpy(k)[0, :, 0].T).max() > 0.1
