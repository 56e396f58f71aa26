"""Training steps: the same curve in both twins, and the loss that was there before the step."""

import functools

import jax
import numpy as np
import pytest
import torch
from flax import nnx

B, T = 3, 11
BOUND = 1e-12


def tokens_of(seed=0):
    """Rows of ids."""
    return np.random.default_rng(seed).integers(0, 61, (B, T))


def start(gpt, **changes):
    """The state of a small model before its first step; one block compiles fastest."""
    train_config = gpt.package.TrainConfig(learning_rate=3e-3)
    return gpt.package.TrainState.create(
        gpt.model(init_std=0.1, num_layers=1, **changes), train_config
    )


def weights(gpt, state):
    """Copies of a state's weights by path, in each framework's own layout."""
    if gpt.name == "torch":
        return {name: gpt.numpy(x).copy() for name, x in state.model.named_parameters()}
    flat = nnx.to_flat_state(nnx.state(state.model))
    return {".".join(map(str, path)): gpt.numpy(leaf[...]) for path, leaf in flat}


def step(gpt, tokens, state, counts=None, key=None):
    """One training step on arrays from the host: the mean loss and the next state."""
    counts = None if counts is None else gpt.ints(counts)
    with torch.enable_grad():
        loss, state = gpt.package.train_step(gpt.ints(tokens), state, counts, key)
    return float(loss.mean), state


@functools.cache
def curve(gpt, num_steps, dropout=0.0, one_batch=False):
    """Losses of a short training; with dropout, step n has the n-th key."""
    state, losses = start(gpt, dropout=dropout), []
    for n in range(num_steps):
        key = gpt.random.fold_in(gpt.random.key(5), n) if dropout else None
        loss, state = step(gpt, tokens_of(0 if one_batch else n), state, None, key)
        losses.append(loss)
    return np.array(losses)


def current(gpt, state, tokens):
    """The loss of a state's model."""
    return float(gpt.package.evaluate(state.model, [gpt.ints(tokens)]).mean)


def test_the_twins_train_along_the_same_curve(twins):
    flax, torch_curve = (curve(gpt, 20) for gpt in twins)
    np.testing.assert_allclose(flax, torch_curve, rtol=0, atol=BOUND)
    assert np.ptp(flax) > 0.01


def test_the_twins_train_along_the_same_curve_with_dropout(twins):
    flax, torch_curve = (curve(gpt, 20, dropout=0.2) for gpt in twins)
    np.testing.assert_allclose(flax, torch_curve, rtol=0, atol=BOUND)
    assert np.abs(flax - curve(twins[0], 20)).min() > 1e-6  # dropout was active in every step


def test_a_step_returns_the_loss_before_its_update(gpt):
    state, tokens = start(gpt), tokens_of()
    before = current(gpt, state, tokens)
    loss, state = step(gpt, tokens, state)
    np.testing.assert_allclose(loss, before, rtol=0, atol=BOUND)
    assert current(gpt, state, tokens) < before - 1e-3
    again, _ = step(gpt, tokens, state)
    assert again < loss - 1e-3


def test_the_state_counts_its_steps(gpt):
    state = start(gpt)
    for n in range(3):
        assert int(state.step) == n
        _, state = step(gpt, tokens_of(n), state)
    assert int(state.step) == 3


def test_a_state_keeps_its_config(gpt):
    state = start(gpt)
    _, after = step(gpt, tokens_of(), state)
    assert after.config == state.config == gpt.package.TrainConfig(learning_rate=3e-3)


def test_padding_does_not_train(gpt):
    counts = np.array((7, 11, 2))
    padded, found = np.arange(T) >= counts[:, None], []
    for padding in (0, 17):
        loss, state = step(gpt, np.where(padded, padding, tokens_of()), start(gpt), counts)
        found.append((loss, current(gpt, state, tokens_of(1))))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=BOUND)
    loss, state = step(gpt, tokens_of(), start(gpt))
    assert abs(loss - found[0][0]) > 1e-6
    assert abs(current(gpt, state, tokens_of(1)) - found[0][1]) > 1e-6


def test_every_weight_is_trained(gpt):
    state = start(gpt)
    decayed = 1 - state.config.learning_rate * state.config.weight_decay
    before = weights(gpt, state)
    _, state = step(gpt, tokens_of(), state)
    after = weights(gpt, state)
    for name in before:
        # Softmax does not see the key bias: its gradient is rounding, and may be nothing at all.
        if not name.endswith("attention.key.bias"):
            assert np.abs(after[name] - decayed * before[name]).max() > 1e-3, name


def test_one_batch_can_be_learned_by_heart(gpt):
    losses = curve(gpt, 60, one_batch=True)
    assert losses[-1] < 0.35 * losses[0]


def test_evaluation_weighs_every_token_the_same(gpt):
    model = gpt.model()
    tokens = tokens_of()
    batches = [tokens, tokens[:1, :4]]
    found = gpt.package.evaluate(model, [gpt.ints(x) for x in batches])
    parts = [gpt.package.evaluate(model, [gpt.ints(x)]) for x in batches]
    totals, numbers = [float(x.total) for x in parts], [int(x.num_tokens) for x in parts]
    assert int(found.num_tokens) == sum(numbers) == B * (T - 1) + 3
    np.testing.assert_allclose(float(found.mean), sum(totals) / sum(numbers), rtol=0, atol=BOUND)
    mean_of_means = np.mean([float(x.mean) for x in parts])
    assert abs(float(found.mean) - mean_of_means) > 1e-3


def test_evaluation_takes_any_iterable_and_drops_nothing_out(gpt):
    tokens = gpt.ints(tokens_of())
    model, dropped = gpt.model(), gpt.model(dropout=0.5)
    found = gpt.package.evaluate(dropped, iter([tokens]))
    expected = gpt.package.next_token_loss(model(tokens)[0], tokens)
    np.testing.assert_allclose(float(found.mean), float(expected.mean), rtol=0, atol=BOUND)


def test_evaluation_builds_no_graph_in_torch(twins):
    _, gpt = twins
    with torch.enable_grad():
        loss = gpt.package.evaluate(gpt.model(), [gpt.ints(tokens_of())])
    assert not loss.total.requires_grad


def test_evaluation_without_a_batch_is_refused(gpt):
    with pytest.raises(
        ValueError, match=r"evaluate: 0 batches. A loss needs a token. Give at least"
    ):
        gpt.package.evaluate(gpt.model(), [])


def test_a_float32_step_keeps_its_dtypes_under_strict_promotion(gpt):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        state = start(gpt, dtype="float32")
        for n in range(2):
            loss, state = step(gpt, tokens_of(n), state)
        assert {x.dtype.name for x in weights(gpt, state).values()} == {"float32"}
    assert np.isfinite(loss)
