"""Training steps: one curve in both twins with everything on, and the laws that it obeys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

B, T = 4, 11
COUNTS = np.array((9, 11, 2, 5))
BOUND = 1e-12

# An epsilon of 1 makes an update smooth in the gradient: Adam's own blows rounding up where a
# gradient is almost zero.
PLAIN = dict(learning_rate=0.3, epsilon=1.0, clip_norm=None)
EVERYTHING = dict(
    learning_rate=0.02, schedule="cosine", warmup_steps=4, total_steps=16, clip_norm=1.2,
    label_smoothing=0.1, accumulation_steps=2,
)  # fmt: skip


def tokens_of(seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, 61, (B, T))


def labels_of(seed=0):
    """The same rows, with some tokens that are not scored."""
    unscored = np.random.default_rng(seed + 1000).random((B, T)) < 0.2
    return np.where(unscored, -100, tokens_of(seed))


def batch(gpt, tokens, counts=None, labels=None):
    """A batch with every field filled, so that jax compiles the same program for all of them."""
    counts = [tokens.shape[1]] * tokens.shape[0] if counts is None else counts
    labels = tokens if labels is None else labels
    return gpt.package.Batch(gpt.ints(tokens), gpt.ints(counts), gpt.ints(labels))


def start(gpt, changes=PLAIN, seed=None, **sizes):
    """The state of a small model before its first step; dropout is active only with a seed."""
    model = gpt.model(**dict(init_std=0.1, num_layers=1, dropout=0.2) | sizes)
    key = None if seed is None else gpt.random.key(seed)
    return gpt.package.TrainState.create(model, gpt.package.TrainConfig(**changes), key)


def at_step(gpt, state, step):
    """The state with another number of steps behind it."""
    return dataclasses.replace(state, step=gpt.ints(step) if gpt.name == "flax" else step)


def step(gpt, data, state):
    """One training step."""
    with torch.enable_grad():
        return gpt.package.train_step(data, state)


def weights(gpt, state):
    """Copies of a state's weights by path, in each framework's own layout."""
    if gpt.name == "torch":
        return {name: gpt.numpy(x).copy() for name, x in state.model.named_parameters()}
    flat = nnx.to_flat_state(nnx.state(state.model))
    return {".".join(map(str, path)): gpt.numpy(leaf[...]) for path, leaf in flat}


def current(gpt, state, data):
    """The loss of a state's model."""
    return float(gpt.package.evaluate(state.model, [data]).loss.mean)


@functools.cache
def curve(gpt, everything=False, seed=5):
    """Losses and norms of twenty steps, and the loss of the last weights on other text."""
    state = start(gpt, EVERYTHING, seed) if everything else start(gpt)
    found = []
    for n in range(20):
        counts = np.roll(COUNTS, n) if everything else None
        data = batch(gpt, tokens_of(n), counts, labels_of(n) if everything else None)
        result, state = step(gpt, data, state)
        found.append((float(result.loss.mean), float(result.gradient_norm)))
    return np.array(found), current(gpt, state, batch(gpt, tokens_of(100)))


def test_the_twins_train_along_the_same_curve(twins):
    (flax, flax_end), (torch_curve, torch_end) = (curve(gpt) for gpt in twins)
    np.testing.assert_allclose(flax, torch_curve, rtol=0, atol=BOUND)
    assert abs(flax_end - torch_end) < BOUND
    assert np.ptp(flax[:, 0]) > 0.01


def test_the_twins_train_along_the_same_curve_with_everything_on(twins):
    (flax, flax_end), (torch_curve, torch_end) = (curve(gpt, everything=True) for gpt in twins)
    np.testing.assert_allclose(flax, torch_curve, rtol=0, atol=BOUND)
    assert abs(flax_end - torch_end) < BOUND
    clipped = flax[:, 1] > EVERYTHING["clip_norm"]
    assert 3 <= clipped.sum() <= 17  # some norms were clipped and some not
    other, _ = curve(twins[0], everything=True, seed=6)
    assert np.abs(flax - other)[:, 0].min() > 1e-6  # dropout was active in every step


def test_a_step_returns_the_loss_before_its_update(gpt):
    state, data = start(gpt), batch(gpt, tokens_of())
    before = current(gpt, state, data)
    result, state = step(gpt, data, state)
    np.testing.assert_allclose(float(result.loss.mean), before, rtol=0, atol=BOUND)
    assert bool(result.applied)
    assert current(gpt, state, data) < before - 1e-3
    again, _ = step(gpt, data, state)
    assert float(again.loss.mean) < before - 1e-3


def test_the_state_counts_its_steps(gpt):
    state = start(gpt)
    for n in range(3):
        assert int(state.step) == n
        _, state = step(gpt, batch(gpt, tokens_of(n)), state)
    assert int(state.step) == 3


def test_a_state_keeps_what_it_needs_to_know(gpt):
    state = start(gpt)
    _, after = step(gpt, batch(gpt, tokens_of()), state)
    assert after.config == state.config == gpt.package.TrainConfig(**PLAIN)
    assert after.task is state.task is gpt.package.NEXT_TOKEN
    assert after.key is state.key is None


def test_every_weight_is_trained(gpt):
    state = start(gpt)
    before = weights(gpt, state)
    decay = state.config.learning_rate * state.config.weight_decay
    _, state = step(gpt, batch(gpt, tokens_of()), state)
    for name, after in weights(gpt, state).items():
        # Softmax does not see the key bias: its gradient is rounding, and may be nothing at all.
        if not name.endswith("attention.key.bias"):
            moved = after - before[name]
            assert np.abs(moved).max() > 1e-4, name
            assert np.abs(moved + decay * before[name]).max() > 1e-4, name


# --- what does not train ---


def after_one_step(gpt, *data):
    """The loss of a fresh model, and its weights behind one step."""
    result, state = step(gpt, batch(gpt, *data), start(gpt))
    return float(result.loss.mean), weights(gpt, state)


def gap(one, two):
    """The largest difference between two results of `after_one_step`."""
    return max(
        abs(one[0] - two[0]), *(np.abs(x - two[1][name]).max() for name, x in one[1].items())
    )


def test_padding_does_not_train(gpt):
    padded, tokens = np.arange(T) >= COUNTS[:, None], tokens_of()
    zeros, others = (
        after_one_step(gpt, np.where(padded, padding, tokens), COUNTS) for padding in (0, 17)
    )
    assert gap(zeros, others) == 0.0
    assert gap(zeros, after_one_step(gpt, tokens)) > 1e-3


def test_an_ignored_label_does_not_train(gpt):
    tokens, labels = tokens_of(), labels_of()
    loss, _ = found = after_one_step(gpt, tokens, None, labels)
    assert gap(found, after_one_step(gpt, tokens)) > 1e-3
    # The first label of a row is never predicted, and the others are the mean of those scored.
    labels[:, 0] = -100
    assert gap(found, after_one_step(gpt, tokens, None, labels)) == 0.0
    expected = gpt.package.evaluate(start(gpt).model, [batch(gpt, tokens, None, labels)]).loss
    assert int(expected.num_tokens) == np.sum(labels[:, 1:] != -100) < B * (T - 1)
    np.testing.assert_allclose(loss, float(expected.mean), rtol=0, atol=BOUND)


def test_a_row_without_a_scored_label_does_not_train(gpt):
    tokens = tokens_of()
    others, labels = tokens.copy(), tokens.copy()
    others[2], labels[2] = tokens_of(1)[2], -100
    found = [after_one_step(gpt, x, None, labels) for x in (tokens, others)]
    assert gap(*found) == 0.0


def test_labels_of_none_are_the_tokens_and_counts_of_none_the_width(twins):
    _, gpt = twins  # in both twins the task says so; in torch it costs no compilation
    expected = after_one_step(gpt, tokens_of())
    result, state = step(gpt, gpt.package.Batch(gpt.ints(tokens_of())), start(gpt))
    assert gap(expected, (float(result.loss.mean), weights(gpt, state))) == 0.0


# --- accumulation ---


def test_a_batch_in_parts_is_the_batch_at_once(gpt):
    data = batch(gpt, tokens_of(), COUNTS, labels_of())
    found = []
    for num in (1, B):
        result, state = step(gpt, data, start(gpt, PLAIN | dict(accumulation_steps=num)))
        found.append((result, weights(gpt, state)))
    (one, one_weights), (parts, parts_weights) = found
    assert int(one.loss.num_tokens) == int(parts.loss.num_tokens)
    for x, y in ((one.loss.total, parts.loss.total), (one.gradient_norm, parts.gradient_norm)):
        np.testing.assert_allclose(float(x), float(y), rtol=0, atol=BOUND)
    for name, x in one_weights.items():
        np.testing.assert_allclose(x, parts_weights[name], rtol=0, atol=BOUND, err_msg=name)


def test_a_mean_of_the_means_of_parts_would_be_another_loss_and_another_gradient(twins):
    _, gpt = twins
    tokens, labels, losses = tokens_of(), labels_of(), []
    data = batch(gpt, tokens, COUNTS, labels)
    whole, _ = step(gpt, data, start(gpt, PLAIN | dict(accumulation_steps=2)))
    model = start(gpt).model
    with torch.enable_grad():
        for rows in (slice(0, 2), slice(2, 4)):
            logits = model(gpt.ints(tokens[rows]), counts_B=gpt.ints(COUNTS[rows]))[0]
            scored = gpt.ints(labels[rows]), gpt.ints(COUNTS[rows])
            losses.append(gpt.package.next_token_loss(logits, *scored).mean)
        sum(losses).div(2).backward()
    mean_of_means = np.mean([x.item() for x in losses])
    norm = np.sqrt(sum(float((x.grad**2).sum()) for x in model.parameters()))
    assert abs(mean_of_means - float(whole.loss.mean)) > 1e-2
    assert abs(norm - float(whole.gradient_norm)) > 1e-2


def test_rows_that_do_not_divide_into_the_parts_are_refused(gpt):
    state = start(gpt, PLAIN | dict(accumulation_steps=3))
    message = (
        r"^train_step: 4 rows in 3 parts\. Parts have the same number of rows\. Choose "
        r"accumulation_steps that divides the batch\."
    )
    with pytest.raises(ValueError, match=message):
        step(gpt, batch(gpt, tokens_of()), state)


# --- dropout ---


def loss_at(gpt, step_number, seed=5):
    """The loss of a fresh model in one step of a training with dropout."""
    state = at_step(gpt, start(gpt, EVERYTHING, seed), step_number)
    return float(step(gpt, batch(gpt, tokens_of(), COUNTS, labels_of()), state)[0].loss.total)


def test_each_part_of_each_step_drops_by_its_own_key_in_both_twins(twins):
    _, gpt = twins
    model, smoothing = start(gpt).model, EVERYTHING["label_smoothing"]
    for step_number in (0, 7):
        expected = 0.0
        for part, rows in enumerate((slice(0, 2), slice(2, 4))):
            key = gpt.random.fold_in(gpt.random.fold_in(gpt.random.key(5), step_number), part)
            counts = gpt.ints(COUNTS[rows])
            logits = model(gpt.ints(tokens_of()[rows]), counts_B=counts, key=key)[0]
            labels = gpt.ints(labels_of()[rows])
            loss = gpt.package.next_token_loss(logits, labels, counts, smoothing)
            expected += float(loss.total)
        for twin in twins:
            np.testing.assert_allclose(loss_at(twin, step_number), expected, rtol=0, atol=1e-11)


def test_the_same_key_and_step_drop_the_same_and_any_other_do_not(gpt):
    assert loss_at(gpt, 3) == loss_at(gpt, 3)
    different = [loss_at(gpt, 3), loss_at(gpt, 4), loss_at(gpt, 3, seed=6)]
    assert np.abs(np.subtract.outer(different, different))[np.triu_indices(3, 1)].min() > 1e-3


def test_without_a_key_nothing_is_dropped(twins):
    _, gpt = twins
    expected = current(gpt, start(gpt, dropout=0.0), batch(gpt, tokens_of()))
    for twin in twins:
        loss, _ = after_one_step(twin, tokens_of())
        np.testing.assert_allclose(loss, expected, rtol=0, atol=BOUND)


# --- learning by heart ---

FAST = dict(learning_rate=0.03, weight_decay=0.0)


@functools.cache
def overfitted(gpt):
    """The losses of a model that learns one ragged batch by heart, and its state."""
    with torch.enable_grad():
        return gpt.package.overfit_one_batch(batch(gpt, tokens_of(), COUNTS), start(gpt, FAST))


def test_one_batch_can_be_learned_by_heart(gpt):
    losses, state = overfitted(gpt)
    assert losses[0] > 3.5  # close to log 61: nothing was known
    assert losses[-1] < 0.01 <= losses[-2]  # and it stopped there
    assert len(losses) == int(state.step) < 100
    assert current(gpt, state, batch(gpt, tokens_of(), COUNTS)) < 0.01


def test_the_twins_learn_by_heart_along_the_same_curve(twins):
    flax, torch_losses = (overfitted(gpt)[0] for gpt in twins)
    np.testing.assert_allclose(flax, torch_losses, rtol=0, atol=1e-9)


def test_learning_by_heart_stops_at_its_target_and_after_its_steps(gpt):
    data = batch(gpt, tokens_of(), COUNTS)
    with torch.enable_grad():
        for limits, num_steps in (
            (dict(max_steps=3), 3),
            (dict(max_steps=0), 0),
            (dict(target=1e9), 1),
            (dict(target=overfitted(gpt)[0][4] + 1e-9), 5),
        ):
            losses, state = gpt.package.overfit_one_batch(data, start(gpt, FAST), **limits)
            assert len(losses) == int(state.step) == num_steps
            np.testing.assert_allclose(losses, overfitted(gpt)[0][:num_steps], rtol=0, atol=BOUND)


# --- evaluation ---


def by_hand(gpt, model, tokens, counts, labels):
    """Total, number and hits of one batch, one token after the other."""
    logits = gpt.numpy(model(gpt.ints(tokens), counts_B=gpt.ints(counts))[0])
    total, number, hits = 0.0, 0, 0
    for b in range(len(tokens)):
        for t in range(1, counts[b]):
            if labels[b, t] != -100:
                row = logits[b, t - 1]
                total += np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[labels[b, t]]
                number += 1
                hits += int(row.argmax() == labels[b, t])
    return total, number, hits


def three_batches():
    """Tokens, counts and labels of which some are hits, and which are hard to different degrees."""
    found = []
    for seed in range(3):
        tokens, counts, labels = tokens_of(seed), np.roll(COUNTS, seed), labels_of(seed)
        repeated = tokens[:, :1].repeat(T, axis=1)  # a tied head likes to repeat
        found.append((np.where(np.arange(B)[:, None] < seed, repeated, tokens), counts, labels))
    return found


def test_an_evaluation_is_the_sum_over_a_loop_of_tokens(twins):
    data, results = three_batches(), []
    loops = [by_hand(twins[1], start(twins[1]).model, *x) for x in data]
    total, number, hits = (sum(x) for x in zip(*loops, strict=True))
    for gpt in twins:
        found = gpt.package.evaluate(start(gpt).model, iter([batch(gpt, *x) for x in data]))
        assert (int(found.loss.num_tokens), int(found.num_correct)) == (number, hits)
        np.testing.assert_allclose(float(found.loss.total), total, rtol=0, atol=1e-10)
        np.testing.assert_allclose(float(found.loss.perplexity), np.exp(total / number), rtol=1e-12)
        np.testing.assert_allclose(float(found.accuracy), hits / number, rtol=0, atol=BOUND)
        results.append(found)
    assert 0 < hits < number
    flax, pytorch = ((float(x.loss.mean), float(x.accuracy)) for x in results)
    np.testing.assert_allclose(flax, pytorch, rtol=0, atol=BOUND)


def test_an_evaluation_weighs_every_token_the_same(gpt):
    model = start(gpt).model
    data = [batch(gpt, *x) for x in three_batches()]
    parts = [gpt.package.evaluate(model, [x]) for x in data]
    whole = gpt.package.evaluate(model, data)
    added = parts[0] + parts[1] + parts[2]
    assert float(whole.loss.total) == float(added.loss.total)
    assert float(whole.accuracy) == float(added.accuracy)
    for of in (lambda x: x.loss.mean, lambda x: x.loss.perplexity, lambda x: x.accuracy):
        assert abs(float(of(whole)) - np.mean([float(of(x)) for x in parts])) > 1e-3


def test_padding_is_not_evaluated(gpt):
    padded, tokens = np.arange(T) >= COUNTS[:, None], tokens_of()
    found = [
        gpt.package.evaluate(start(gpt).model, [batch(gpt, np.where(padded, x, tokens), COUNTS)])
        for x in (0, 17)
    ]
    numbers = [
        (float(x.loss.total), int(x.loss.num_tokens), int(x.num_correct)) for x in found
    ]  # fmt: skip
    assert numbers[0] == numbers[1]
    assert numbers[0][1] == np.sum(COUNTS - 1)


def test_where_nothing_is_scored_accuracy_and_loss_are_nan(gpt):
    found = gpt.package.evaluate(start(gpt).model, [batch(gpt, tokens_of(), [1, 0, 1, 1])])
    assert np.isnan(float(found.accuracy)) and np.isnan(float(found.loss.mean))
    assert (int(found.loss.num_tokens), int(found.num_correct)) == (0, 0)


def test_an_evaluation_has_neither_dropout_nor_smoothing(gpt):
    state = start(gpt, EVERYTHING, seed=5)
    found = current(gpt, state, batch(gpt, tokens_of()))
    assert found == current(gpt, start(gpt), batch(gpt, tokens_of()))


def test_evaluation_builds_no_graph_in_torch(twins):
    _, gpt = twins
    with torch.enable_grad():
        found = gpt.package.evaluate(start(gpt).model, [batch(gpt, tokens_of())])
    assert not found.loss.total.requires_grad


def test_evaluation_without_a_batch_is_refused(gpt):
    with pytest.raises(
        ValueError, match=r"evaluate: 0 batches. A loss needs a token. Give at least"
    ):
        gpt.package.evaluate(gpt.model(), [])


# --- dtypes ---


def test_a_float32_step_with_everything_on_stays_float32_under_strict_promotion(gpt):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        model = gpt.package.GPT(gpt.config(num_layers=1, dropout=0.2, dtype="float32"))
        config = gpt.package.TrainConfig(**EVERYTHING)
        state = gpt.package.TrainState.create(model, config, gpt.random.key(5))
        data = batch(gpt, tokens_of(), COUNTS, labels_of())
        if gpt.name == "flax":  # tracing is enough: it fixes every dtype
            result, state = jax.eval_shape(gpt.package.train_step, data, state)
            floats = jax.tree.leaves((state.parameters, state.optimizer, result))
            floats = [x for x in floats if jnp.issubdtype(x.dtype, jnp.floating)]
            count = len(jax.tree.leaves(state.parameters))
        else:
            result, state = step(gpt, data, state)
            moments = [x for s in state.optimizer.state.values() for x in s.values()]
            floats = [*state.model.parameters(), *moments, result.loss.total, result.gradient_norm]
            count = len(list(state.model.parameters()))
        assert {str(x.dtype).removeprefix("torch.") for x in floats} == {"float32"}
        assert len(floats) >= 3 * count + 2
