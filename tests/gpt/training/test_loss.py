"""The loss against a loop over tokens; sums add up where means would not."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

B, T, V = 3, 7, 13
BOUND = 1e-12

examples = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def batch(seed=0, num_tokens=T):
    """Logits and labels."""
    rng = np.random.default_rng(seed)
    logits = 3.0 * rng.normal(size=(B, num_tokens, V))
    return logits, rng.integers(0, V, (B, num_tokens))


def loss_of(gpt, logits, labels, counts=None):
    """The twin's loss of arrays from the host."""
    counts = None if counts is None else gpt.ints(counts)
    return gpt.package.next_token_loss(gpt.floats(logits), gpt.ints(labels), counts)


def by_loop(logits, labels, counts, ignored, smoothing=0.0):
    """Sum and number, one scored token after the other."""
    total, number = 0.0, 0
    for b in range(labels.shape[0]):
        for t in range(1, counts[b]):  # the token at t is predicted from the logits at t - 1
            if labels[b, t] != ignored:
                row = logits[b, t - 1]
                target = smoothing / V + (1.0 - smoothing) * (np.arange(V) == labels[b, t])
                total += np.log(np.sum(np.exp(row - row.max()))) + row.max() - target @ row
                number += 1
    return total, number


@examples
@hypothesis.given(seed=st.integers(0, 2**32), data=st.data())
def test_the_loss_is_the_sum_over_a_loop_of_tokens(gpt, seed, data):
    logits, labels = batch(seed)
    counts = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    share = data.draw(st.sampled_from([0.0, 0.3, 0.8]))
    unscored = np.random.default_rng(seed).random((B, T)) < share
    labels = np.where(unscored, gpt.package.IGNORE_INDEX, labels)
    loss = loss_of(gpt, logits, labels, counts)
    total, number = by_loop(logits, labels, counts, gpt.package.IGNORE_INDEX)
    assert int(loss.num_tokens) == number
    np.testing.assert_allclose(float(loss.total), total, rtol=0, atol=BOUND)


def test_without_counts_a_row_scores_all_tokens_but_its_first(gpt):
    logits, labels = batch()
    loss = loss_of(gpt, logits, labels)
    total, number = by_loop(logits, labels, [T] * B, gpt.package.IGNORE_INDEX)
    assert int(loss.num_tokens) == number == B * (T - 1)
    np.testing.assert_allclose(float(loss.total), total, rtol=0, atol=BOUND)


def test_the_ignored_label_is_the_one_that_users_know(gpt):
    assert gpt.package.IGNORE_INDEX == -100


def test_what_is_not_scored_may_be_anything(gpt):
    logits, labels = batch()
    counts = np.array((5, 0, 2))
    expected = loss_of(gpt, logits, labels, counts)
    padded = np.arange(T) >= counts[:, None]
    for padding in (0, -1, V + 5):
        other = np.where(padded[:, :, None], 1e30, logits)
        found = loss_of(gpt, other, np.where(padded, padding, labels), counts)
        assert float(found.total) == float(expected.total)
        assert int(found.num_tokens) == int(expected.num_tokens)


def test_the_last_logits_and_the_first_label_of_a_row_are_not_used(gpt):
    logits, labels = batch()
    expected = loss_of(gpt, logits, labels)
    logits[:, -1], labels[:, 0] = np.nan, gpt.package.IGNORE_INDEX
    found = loss_of(gpt, logits, labels)
    assert float(found.total) == float(expected.total)
    assert int(found.num_tokens) == int(expected.num_tokens)


def test_a_model_that_knows_the_next_token_has_no_loss(gpt):
    _, labels = batch()
    labels[:, 1:] = (labels[:, :1] + np.arange(1, T)) % V  # neighbours differ
    sure = 50.0 * np.eye(V)[labels]
    knows_the_next = np.roll(sure, -1, axis=1)
    assert 0.0 <= float(loss_of(gpt, knows_the_next, labels).mean) < 1e-12
    assert float(loss_of(gpt, sure, labels).mean) > 49.0


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary(gpt):
    loss = loss_of(gpt, np.zeros((B, T, V)), batch()[1])
    np.testing.assert_allclose(float(loss.perplexity), V, rtol=1e-14)
    np.testing.assert_allclose(float(loss.mean), np.log(V), rtol=1e-14)


def test_two_losses_add_up_to_the_loss_of_both_batches_and_their_means_do_not(gpt):
    (logits, labels), (more_logits, more_labels) = batch(0), batch(1)
    counts, more_counts = (7, 7, 7), (2, 3, 2)
    one = loss_of(gpt, logits, labels, counts)
    two = loss_of(gpt, more_logits, more_labels, more_counts)
    both = loss_of(
        gpt,
        np.concatenate([logits, more_logits]),
        np.concatenate([labels, more_labels]),
        counts + more_counts,
    )
    found = one + two
    assert int(found.num_tokens) == int(both.num_tokens)
    np.testing.assert_allclose(float(found.mean), float(both.mean), rtol=0, atol=BOUND)
    assert abs((float(one.mean) + float(two.mean)) / 2 - float(both.mean)) > 1e-2


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(gpt):
    one, two = loss_of(gpt, *batch(0)), loss_of(gpt, *batch(1))
    both = one + two
    np.testing.assert_allclose(float(both.perplexity), np.exp(float(both.mean)), rtol=1e-14)
    assert abs((float(one.perplexity) + float(two.perplexity)) / 2 - float(both.perplexity)) > 1e-2


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 1)])
def test_where_nothing_is_scored_the_mean_is_nan_and_the_sum_zero(gpt, counts):
    loss = loss_of(gpt, *batch(), counts)
    assert (float(loss.total), int(loss.num_tokens)) == (0.0, 0)
    assert np.isnan(float(loss.mean)) and np.isnan(float(loss.perplexity))


def test_nothing_scored_adds_nothing(gpt):
    one, none = loss_of(gpt, *batch()), loss_of(gpt, *batch(1), (1, 0, 1))
    assert float((one + none).mean) == float(one.mean)


def test_rows_of_one_token_have_nothing_to_predict(gpt):
    loss = loss_of(gpt, *batch(num_tokens=1))
    assert (float(loss.total), int(loss.num_tokens)) == (0.0, 0)


def test_large_logits_do_not_overflow(gpt):
    logits, labels = batch()
    expected = loss_of(gpt, logits, labels)
    found = loss_of(gpt, logits + 1e4, labels)  # a shift changes no probability
    np.testing.assert_allclose(float(found.total), float(expected.total), rtol=0, atol=1e-8)


# --- any classes, and smoothed targets ---


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(5,), (B, T)])
def test_cross_entropy_is_torchs_with_its_smoothing_and_its_ignored_label(gpt, shape, smoothing):
    rng = np.random.default_rng(0)
    logits, targets = 3.0 * rng.normal(size=(*shape, V)), rng.integers(0, V, shape)
    targets[0] = gpt.package.IGNORE_INDEX
    loss = gpt.package.cross_entropy(gpt.floats(logits), gpt.ints(targets), smoothing)
    flat = torch.from_numpy(logits).reshape(-1, V), torch.from_numpy(targets).reshape(-1)
    for reduction, found in (("sum", loss.total), ("mean", loss.mean)):
        expected = F.cross_entropy(
            *flat, label_smoothing=smoothing, ignore_index=-100, reduction=reduction
        )
        np.testing.assert_allclose(float(found), float(expected), rtol=1e-14)
    assert int(loss.num_tokens) == np.sum(targets != -100) < targets.size


def test_the_next_tokens_loss_passes_its_smoothing_on(gpt):
    logits, labels = batch()
    counts = (5, 0, 2)
    found = gpt.package.next_token_loss(
        gpt.floats(logits), gpt.ints(labels), gpt.ints(counts), label_smoothing=0.3
    )
    total, number = by_loop(logits, labels, counts, gpt.package.IGNORE_INDEX, 0.3)
    sharp, _ = by_loop(logits, labels, counts, gpt.package.IGNORE_INDEX)
    assert int(found.num_tokens) == number
    np.testing.assert_allclose(float(found.total), total, rtol=0, atol=BOUND)
    assert abs(float(found.total) - sharp) > 1e-2


def test_smoothing_keeps_a_sure_model_from_a_loss_of_zero(gpt):
    targets = np.arange(V)
    for smoothing in (0.1, 0.4):
        # The best logits are those of the smoothed targets, whose loss is their entropy.
        q = np.full((V, V), smoothing / V) + (1 - smoothing) * np.eye(V)
        losses = [
            float(gpt.package.cross_entropy(gpt.floats(x), gpt.ints(targets), smoothing).mean)
            for x in (np.log(q), 50.0 * np.eye(V))
        ]
        entropy = -np.sum(q[0] * np.log(q[0]))
        np.testing.assert_allclose(losses[0], entropy, rtol=0, atol=BOUND)
        assert losses[1] > entropy + 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_of_16_bit_logits_is_computed_and_added_up_in_float32(gpt, dtype):
    logits, labels = batch()
    narrow = gpt.floats(logits.astype("float32"))
    narrow = narrow.astype(dtype) if gpt.name == "flax" else narrow.to(getattr(torch, dtype))
    loss = gpt.package.next_token_loss(narrow, gpt.ints(labels))
    wide = np.asarray(narrow.astype("float64") if gpt.name == "flax" else narrow.double())
    total, _ = by_loop(wide, labels, [T] * B, gpt.package.IGNORE_INDEX)
    assert str(loss.total.dtype).removeprefix("torch.") == "float32"
    np.testing.assert_allclose(float(loss.total), total, rtol=2e-6)


def test_the_targets_of_the_next_token_are_shifted_once_and_padding_is_ignored(gpt):
    labels = gpt.ints([[1, 2, 3, 4], [5, -100, 6, 7], [8, 9, 10, 11]])
    targets = gpt.package.training.loss.next_token_targets
    assert targets(labels).tolist() == [[2, 3, 4], [-100, 6, 7], [9, 10, 11]]
    found = targets(labels, gpt.ints([4, 3, 1])).tolist()
    assert found == [[2, 3, 4], [-100, 6, -100], [-100, -100, -100]]


def test_a_loss_goes_through_its_frameworks_trees(gpt):
    loss = loss_of(gpt, *batch())
    tree_map = jax.tree.map if gpt.name == "flax" else pytree.tree_map
    doubled = tree_map(lambda leaf: leaf + leaf, loss)
    assert type(doubled) is type(loss)
    assert float(doubled.total) == float((loss + loss).total)
    assert int(doubled.num_tokens) == int((loss + loss).num_tokens)
