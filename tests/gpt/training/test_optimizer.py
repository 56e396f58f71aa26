"""AdamW, the schedule, the clip and the loss scale against their definitions, written out in NumPy.

Beside each stands what the frameworks' own default would have done.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from flax_gpt.training import optimizer as flax_optimizer
from torch_gpt.training import optimizer as torch_optimizer

BOUND = 1e-12

# A model that computes nothing itself, with one layer of each kind; shapes as flax lays them out.
SHAPES = {
    "linear.weight": (3, 2),
    "linear.bias": (2,),
    "embedding.weight": (5, 4),
    "norm.weight": (7,),
    "norm.bias": (7,),
}
DECAYED = {"linear.weight"}
PEAK = 0.08


class FlaxLeaves(nnx.Module):
    """The layers in flax."""

    def __init__(self):
        kinds = dict(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(3, 2, **kinds)
        self.embedding = nnx.Embed(5, 4, **kinds)
        self.norm = nnx.LayerNorm(7, **kinds)

    def arrays(self):
        """Every leaf by torch's name for it."""
        linear, norm = self.linear, self.norm
        leaves = linear.kernel, linear.bias, self.embedding.embedding, norm.scale, norm.bias
        return dict(zip(SHAPES, leaves, strict=True))


class TorchLeaves(torch.nn.Module):
    """The layers in torch."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2, dtype=torch.float64)
        self.embedding = torch.nn.Embedding(5, 4, dtype=torch.float64)
        self.norm = torch.nn.LayerNorm(7, dtype=torch.float64)

    def arrays(self):
        """Every leaf by its name, laid out as in flax."""
        return {name: x.T if name in DECAYED else x for name, x in self.named_parameters()}


def numbers(seed, *axes):
    """One array per leaf."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=axes + shape) for name, shape in SHAPES.items()}


def leaves(gpt, seed=0):
    """The model with weights from a seed."""
    model = FlaxLeaves() if gpt.name == "flax" else TorchLeaves()
    for name, leaf in model.arrays().items():
        value = gpt.floats(numbers(seed)[name])
        leaf.set_value(value) if gpt.name == "flax" else leaf.data.copy_(value)
    return model


def weights(gpt, model):
    """Copies of a model's weights."""
    read = (lambda leaf: leaf[...]) if gpt.name == "flax" else (lambda leaf: leaf)
    return {name: gpt.numpy(read(leaf)).copy() for name, leaf in model.arrays().items()}


# --- whole training steps on a loss whose gradient is written out ---

NUM_TOKENS, BAD_TOKEN = 11, 10
FEATURES = numbers(100, NUM_TOKENS)
FEATURES["norm.bias"][BAD_TOKEN] = np.nan


@functools.cache
def task(gpt):
    """Two classes: z against 0, where z adds up all weights, each times a feature of the token."""
    features = {name: gpt.floats(x) for name, x in FEATURES.items()}

    def logits(model, batch, key):
        tokens = batch.tokens_BT[:, 0]
        z = 0.0
        for name, leaf in model.arrays().items():
            leaf = leaf[...] if gpt.name == "flax" else leaf
            z = z + (features[name][tokens] * leaf[None]).reshape(len(tokens), -1).sum(-1)
        stack = jnp.stack if gpt.name == "flax" else torch.stack
        return stack([z, 0.0 * z], -1)

    return gpt.package.Task(logits, lambda batch: batch.labels)


def batches(num, seed=0, rows=4):
    """Tokens and labels, one of which is not scored."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        labels = rng.integers(0, 2, rows)
        labels[rng.integers(rows)] = -100
        found.append((rng.integers(0, BAD_TOKEN, (rows, 1)), labels))
    return found


def gradient_by_hand(w, tokens, labels):
    """Of the mean cross entropy over the scored rows."""
    features = {name: x[tokens[:, 0]] for name, x in FEATURES.items()}
    z = sum((features[name] * w[name]).reshape(len(tokens), -1).sum(-1) for name in SHAPES)
    slope = (1 / (1 + np.exp(-z)) - (labels == 0)) * (labels != -100) / np.sum(labels != -100)
    return {name: np.tensordot(slope, features[name], 1) for name in SHAPES}


def definition(config, rates, w, gradient):
    """Clip, then Loshchilov and Hutter, 2019, algorithm 2: the norm and the weights of each step.

    Args:
        config: the constants.
        rates: of each step.
        w: the weights before the first step.
        gradient: of the n-th step, from n and the weights.
    """
    m = {name: np.zeros_like(x) for name, x in w.items()}
    v = {name: np.zeros_like(x) for name, x in w.items()}
    for step, rate in enumerate(rates, start=1):
        g = gradient(step - 1, w)
        norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        scale = 1.0 if config.clip_norm is None else min(config.clip_norm / (norm + 1e-6), 1.0)
        new = {}
        for name in w:
            clipped = scale * g[name]
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * clipped
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * clipped**2
            m_hat = m[name] / (1 - config.beta1**step)
            v_hat = v[name] / (1 - config.beta2**step)
            direction = m_hat / (np.sqrt(v_hat) + config.epsilon)
            decay = config.weight_decay if config.decay_all or name in DECAYED else 0.0
            new[name] = w[name] - rate * (direction + decay * w[name])
        w = new
        yield norm, w


def run(gpt, state, tokens, labels):
    """One training step on arrays from the host."""
    with torch.enable_grad():
        return gpt.package.train_step(
            gpt.package.Batch(gpt.ints(tokens), labels=gpt.ints(labels)), state
        )


def fall(x):
    """Half a cosine from the peak to a quarter of it."""
    return PEAK * (0.25 + 0.75 * (1 + np.cos(np.pi * x)) / 2)


# Every constant away from its default; an epsilon that tells inside the root from outside; a norm
# that clips some steps and not others.
ODD = dict(
    learning_rate=PEAK, beta1=0.7, beta2=0.83, epsilon=0.3, weight_decay=0.9, clip_norm=1.3,
    final_fraction=0.25,
)  # fmt: skip
COSINE = ODD | dict(schedule="cosine", warmup_steps=2, total_steps=6)
CASES = {
    "defaults": (dict(), [1e-3] * 8),
    "constant": (ODD | dict(warmup_steps=4), [0.02, 0.04, 0.06] + [PEAK] * 5),
    "linear": (
        ODD | dict(schedule="linear", total_steps=6, decay_all=True),
        [0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02, 0.02],
    ),
    "cosine": (
        COSINE | dict(accumulation_steps=2),
        [0.04, PEAK, PEAK, fall(0.25), fall(0.5), fall(0.75), 0.02, 0.02],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_steps_are_those_of_the_definition(gpt, case):
    changes, rates = CASES[case]
    config, data = gpt.package.TrainConfig(**changes), batches(len(rates))
    state = gpt.package.TrainState.create(leaves(gpt), config, task=task(gpt))
    expected = definition(config, rates, numbers(0), lambda n, w: gradient_by_hand(w, *data[n]))
    clipped = set()
    for (tokens, labels), (norm, w) in zip(data, expected, strict=True):
        result, state = run(gpt, state, tokens, labels)
        np.testing.assert_allclose(float(result.gradient_norm), norm, rtol=0, atol=BOUND)
        clipped.add(bool(norm > config.clip_norm))
        for name, found in weights(gpt, state.model).items():
            np.testing.assert_allclose(found, w[name], rtol=0, atol=BOUND, err_msg=name)
    if changes:
        assert clipped == {True, False}


def moments(gpt, state):
    """Copies of both moments, one leaf after the other, and the number of updates."""
    if gpt.name == "flax":
        found = jax.tree.leaves((state.optimizer[0].mu, state.optimizer[0].nu))
    else:
        states = state.optimizer.state.values()
        found = [x[name] for name in ("exp_avg", "exp_avg_sq") for x in states]
    count = gpt.package.training.optimizer.num_updates(state.optimizer)
    return [gpt.numpy(x).copy() for x in found], int(count)


BAD = {
    "a gradient that is not a number": (np.full((4, 1), BAD_TOKEN), np.ones(4)),
    "one bad row among good ones": (np.array([[1], [BAD_TOKEN], [2], [3]]), np.ones(4)),
    "nothing to score": (np.ones((4, 1)), np.full(4, -100)),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_costs_a_step_and_changes_nothing_else(gpt, bad):
    config = gpt.package.TrainConfig(**COSINE | dict(accumulation_steps=2))
    state = gpt.package.TrainState.create(leaves(gpt), config, task=task(gpt))
    good, rates = batches(4), CASES["cosine"][1]
    for tokens, labels in good[:2]:
        result, state = run(gpt, state, tokens, labels)
        assert bool(result.applied)
    before, (old, count) = weights(gpt, state.model), moments(gpt, state)
    result, state = run(gpt, state, *BAD[bad])
    assert not bool(result.applied)
    assert np.isnan(float(result.loss.mean))
    assert np.isnan(float(result.gradient_norm)) == (bad != "nothing to score")
    assert int(state.step) == 3
    for name, x in weights(gpt, state.model).items():
        np.testing.assert_array_equal(x, before[name], strict=True)
    kept, same_count = moments(gpt, state)
    assert same_count == count == 2
    for x, y in zip(kept, old, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)
    # The good ones after it are the third and fourth update: neither rate nor moment was lost.
    for tokens, labels in good[2:]:
        result, state = run(gpt, state, tokens, labels)
        assert bool(result.applied)
    *_, (_, expected) = definition(
        config, rates[:4], numbers(0), lambda n, w: gradient_by_hand(w, *good[n])
    )
    for name, x in weights(gpt, state.model).items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=BOUND)


def test_nothing_to_score_would_still_decay_weights_and_moments(gpt):
    # Its gradient is zero and finite, and an update by it is not nothing.
    (history,) = by_twin(gpt, gpt.package.TrainConfig(decay_all=True), [zeros()])
    for name, x in history.items():
        assert np.abs(x - numbers(0)[name]).max() > 1e-5


# --- AdamW alone, by gradients from the host ---


def zeros():
    """The gradient of nothing."""
    return {name: np.zeros(shape) for name, shape in SHAPES.items()}


def by_twin(gpt, config, gradients):
    """Weights after each update of the twin's own optimizer."""
    optimizer = gpt.package.adamw(config) if gpt.name == "flax" else None
    return by_optimizer(gpt, optimizer, gradients, lambda m: gpt.package.adamw(config, m))


def by_optimizer(gpt, optimizer, gradients, torch_optimizer=None):
    """Weights after each update of any optimizer of the framework."""
    model, history = leaves(gpt), []
    if gpt.name == "flax":
        graphdef, parameters = nnx.split(model)
        state = optimizer.init(parameters)
        for gradient in gradients:
            given = leaves(gpt)
            for name, leaf in given.arrays().items():
                leaf.set_value(gpt.floats(gradient[name]))
            updates, state = optimizer.update(nnx.split(given)[1], state, parameters)
            parameters = optax.apply_updates(parameters, updates)
            history.append(weights(gpt, nnx.merge(graphdef, parameters)))
        return history
    optimizer = torch_optimizer(model)
    for gradient in gradients:
        for name, parameter in model.named_parameters():
            x = gradient[name].T if name in DECAYED else gradient[name]
            parameter.grad = gpt.floats(x).contiguous()
        optimizer.step()
        history.append(weights(gpt, model))
    return history


def distance(one, two):
    """The largest gap between two sets of weights."""
    return max(np.abs(one[name] - two[name]).max() for name in SHAPES)


@pytest.mark.parametrize("changes", [{}, ODD, ODD | dict(decay_all=True), dict(weight_decay=0.0)])
def test_five_updates_are_those_of_the_definition(gpt, changes):
    config = gpt.package.TrainConfig(**changes)
    gradients = [numbers(seed) for seed in range(1, 6)]
    alone = dataclasses.replace(config, clip_norm=None)  # the clip is not the optimizer's
    rates = [config.learning_rate] * 5
    expected = definition(alone, rates, numbers(0), lambda n, _: gradients[n])
    for found, (_, w) in zip(by_twin(gpt, config, gradients), expected, strict=True):
        assert distance(found, w) < BOUND


def test_decay_is_decoupled_from_the_gradient(gpt):
    config = gpt.package.TrainConfig(learning_rate=0.1, weight_decay=0.3, decay_all=True)
    for step, found in enumerate(by_twin(gpt, config, [zeros()] * 3), start=1):
        expected = {name: x * (1 - 0.1 * 0.3) ** step for name, x in numbers(0).items()}
        assert distance(found, expected) < BOUND


def test_only_the_weights_of_linear_layers_decay_unless_told_otherwise(gpt):
    config = gpt.package.TrainConfig(weight_decay=0.3)
    for changes, expected in ((dict(), DECAYED), (dict(decay_all=True), set(SHAPES))):
        (found,) = by_twin(gpt, dataclasses.replace(config, **changes), [zeros()])
        changed = {name for name in SHAPES if np.any(found[name] != numbers(0)[name])}
        assert changed == expected


def test_a_models_linear_layers_decay_and_its_embeddings_norms_and_biases_do_not(gpt):
    model = gpt.package.SequenceClassifier(gpt.config(num_layers=1), 3)
    config = gpt.package.TrainConfig()
    if gpt.name == "flax":
        parameters = jax.tree.map(jnp.ones_like, nnx.state(model))
        optimizer, nothing = gpt.package.adamw(config), jax.tree.map(jnp.zeros_like, parameters)
        updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(parameters), parameters)
        flat = nnx.to_flat_state(updates)
        moved = {".".join(map(str, path[:-1])) for path, x in flat if x[...].any()}
    else:
        for x in model.parameters():
            x.data.fill_(1.0)
            x.grad = torch.zeros_like(x)
        gpt.package.adamw(config, model).step()
        moved = {name for name, x in model.named_parameters() if (x != 1.0).any()}
        moved = {name.removesuffix(".weight") for name in moved}
    block = "attention.query attention.key attention.value attention.out mlp.up mlp.down".split()
    assert moved == {"head", *(f"gpt.blocks.0.{name}" for name in block)}


def test_the_first_update_has_the_size_of_the_rate_whatever_the_gradient(gpt):
    # It is what the bias correction is for: both moments start at zero.
    config = gpt.package.TrainConfig(learning_rate=0.1, beta2=0.999, weight_decay=0.0)
    for scale in (1e-3, 1.0, 1e3):
        gradient = {name: scale * np.sign(x) for name, x in numbers(1).items()}
        (found,) = by_twin(gpt, config, [gradient])
        for name, weight in found.items():
            moved = np.abs(weight - numbers(0)[name])
            np.testing.assert_allclose(moved, 0.1, rtol=1.1 * config.epsilon / scale)


def test_the_frameworks_default_decay_would_have_parted_the_twins(twins):
    flax, pytorch = twins
    (stock_flax,) = by_optimizer(flax, optax.adamw(0.1), [numbers(1)])
    (stock_torch,) = by_optimizer(
        pytorch, None, [numbers(1)], lambda model: torch.optim.AdamW(model.parameters(), 0.1)
    )
    assert distance(stock_flax, stock_torch) > 1e-3
    ours = [by_twin(gpt, gpt.package.TrainConfig(learning_rate=0.1), [numbers(1)]) for gpt in twins]
    assert distance(ours[0][0], ours[1][0]) < BOUND


def test_stock_optimizers_decay_every_leaf_and_ours_the_linear_weights(gpt):
    stock = by_optimizer(
        gpt,
        optax.adamw(1.0, weight_decay=0.3),
        [zeros()],
        lambda model: torch.optim.AdamW(model.parameters(), 1.0, weight_decay=0.3),
    )[0]
    (ours,) = by_twin(gpt, gpt.package.TrainConfig(learning_rate=1.0, weight_decay=0.3), [zeros()])
    for name in set(SHAPES) - DECAYED:
        np.testing.assert_array_equal(ours[name], numbers(0)[name])
        assert np.abs(stock[name] - numbers(0)[name]).max() > 0.1
    np.testing.assert_allclose(ours["linear.weight"], stock["linear.weight"], rtol=0, atol=BOUND)


def test_epsilon_is_added_outside_the_root_and_after_the_correction(gpt):
    # Small gradients, as at the end of a training, are where the place of epsilon shows.
    epsilon, rate = 1e-3, 0.1
    config = gpt.package.TrainConfig(learning_rate=rate, epsilon=epsilon, weight_decay=0.0)
    gradient = {name: epsilon * x for name, x in numbers(1).items()}
    (found,) = by_twin(gpt, config, [gradient])

    def after(direction):
        """Weights after one step, where the corrected moments are the gradient and its square."""
        return {name: w - rate * direction(gradient[name]) for name, w in numbers(0).items()}

    assert distance(found, after(lambda g: g / (np.sqrt(g**2) + epsilon))) < BOUND
    inside = after(lambda g: g / np.sqrt(g**2 + epsilon))
    root = np.sqrt(1 - config.beta2)  # the uncorrected second moment's, as in TensorFlow
    uncorrected = after(lambda g: g / (np.sqrt(g**2) + epsilon / root))
    assert distance(found, inside) > 0.01 and distance(found, uncorrected) > 0.01
    if gpt.name == "flax":
        chain = optax.adam(rate, config.beta1, config.beta2, eps=0.0, eps_root=epsilon)
        assert distance(by_optimizer(gpt, chain, [gradient])[0], inside) < 1e-6


def test_the_bias_correction_of_optax_is_off_in_float32_and_ours_is_not():
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    gradient = numbers(1)["linear.weight"].astype("float32")
    # After one step the corrected moments are the gradient and its square.
    exact = gradient.astype("float64")
    expected = exact / (np.abs(exact) + epsilon)

    def gap(transformation):
        state = transformation.init(jnp.zeros_like(gradient))
        direction, state = transformation.update(jnp.asarray(gradient), state)
        assert direction.dtype == "float32" and int(state.count) == 1
        return np.abs(np.asarray(direction, "float64") - expected).max()

    with jax.enable_x64(False):
        stock = gap(optax.scale_by_adam(beta1, beta2, epsilon))
        with jax.numpy_dtype_promotion("strict"):
            ours = gap(flax_optimizer.scale_by_adam(beta1, beta2, epsilon))
    assert ours <= 4 * np.finfo("float32").eps
    assert stock > 10 * ours


def test_our_state_is_the_one_of_optax():
    gradient = {"matrix": jnp.ones((7, 5))}
    ours = flax_optimizer.scale_by_adam(0.9, 0.999, 1e-8)
    stock = optax.scale_by_adam(0.9, 0.999, 1e-8)
    states = [x.update(gradient, x.init(gradient))[1] for x in (ours, stock)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)


# --- the schedule ---

# (what changes, {count of updates before: rate}), each written out.
RATES = [
    (dict(), {0: 0.8, 1: 0.8, 1000: 0.8}),
    (dict(warmup_steps=4), {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 0.8, 1000: 0.8}),
    (dict(total_steps=4), {0: 0.8, 4: 0.8, 1000: 0.8}),
    (
        dict(schedule="linear", total_steps=8),
        {0: 0.8, 1: 0.725, 4: 0.5, 7: 0.275, 8: 0.2, 9: 0.2, 1000: 0.2},
    ),
    (
        dict(schedule="linear", warmup_steps=4, total_steps=12),
        {0: 0.2, 3: 0.8, 4: 0.8, 5: 0.725, 8: 0.5, 11: 0.275, 12: 0.2, 13: 0.2, 1000: 0.2},
    ),
    (
        dict(schedule="cosine", warmup_steps=4, total_steps=12),
        {0: 0.2, 3: 0.8, 4: 0.8, 6: 0.5 + 0.3 * 2**-0.5, 8: 0.5, 10: 0.5 - 0.3 * 2**-0.5,
         12: 0.2, 1000: 0.2},
    ),
    (dict(schedule="cosine", total_steps=2, final_fraction=0.0), {0: 0.8, 1: 0.4, 2: 0.0, 9: 0.0}),
    (dict(schedule="linear", total_steps=2, final_fraction=1.0), {0: 0.8, 1: 0.8, 2: 0.8}),
]  # fmt: skip


@pytest.mark.parametrize("changes, rates", RATES)
def test_the_rate_of_each_update_is_the_one_written_out(gpt, changes, rates):
    config = gpt.package.TrainConfig(**dict(learning_rate=0.8, final_fraction=0.25) | changes)
    found = {count: float(gpt.package.learning_rate(config, count)) for count in rates}
    assert found == pytest.approx(rates, rel=0, abs=BOUND)


def test_the_first_update_of_a_warmup_moves_and_that_of_optax_does_not(twins):
    flax, _ = twins
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 12, 0.01)
    stock = by_optimizer(flax, optax.adamw(schedule, weight_decay=0.1), [numbers(1)] * 2)
    assert distance(stock[0], numbers(0)) == 0.0
    assert distance(stock[1], numbers(0)) > 0.01
    changes = dict(learning_rate=0.1, schedule="cosine", warmup_steps=4, total_steps=12)
    for gpt in twins:
        state = gpt.package.TrainState.create(
            leaves(gpt), gpt.package.TrainConfig(**COSINE | changes), task=task(gpt)
        )
        _, state = run(gpt, state, *batches(1)[0])
        assert distance(weights(gpt, state.model), numbers(0)) > 1e-3
    # From the second update on, ours is the schedule of optax, one update ahead.
    config = flax.package.TrainConfig(**changes)
    for count in range(1, 4):
        assert float(schedule(count)) == pytest.approx(
            float(flax.package.learning_rate(config, count - 1)), rel=1e-6
        )


def test_torchs_schedule_shifts_when_called_before_the_update_and_ours_cannot(twins):
    _, gpt = twins
    config = gpt.package.TrainConfig(learning_rate=0.8, warmup_steps=4)

    def rates(before):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        optimizer = torch.optim.SGD([parameter], lr=0.8)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 4, 1.0))
        found = []
        for _ in range(5):
            if before:
                scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if not before:
                scheduler.step()
        return found

    assert rates(before=False) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        shifted = rates(before=True)
    assert shifted == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8])
    ours = [gpt.package.learning_rate(config, n) for n in range(5)]
    assert ours == pytest.approx(rates(before=False))


# --- the clip ---


def clipped(gpt, config, gradient):
    """The twin's clipped gradient and the norm it reports."""
    arrays = {name: gpt.floats(np.asarray(x, np.float64)) for name, x in gradient.items()}
    if gpt.name == "flax":
        found, norm = flax_optimizer.clip_gradients(config, arrays)
    else:
        found, model = arrays, torch.nn.Module()
        for name, x in arrays.items():
            parameter = torch.nn.Parameter(torch.zeros_like(x))
            parameter.grad = x
            model.register_parameter(name.replace(".", "_"), parameter)
        norm = torch_optimizer.clip_gradients(config, model)
    return {name: gpt.numpy(x) for name, x in found.items()}, float(norm)


def test_the_norm_is_that_of_the_whole_gradient_and_torchs_epsilon_is_in_the_divisor(gpt):
    config = gpt.package.TrainConfig(clip_norm=1.0)
    found, norm = clipped(gpt, config, {"one": [3.0], "two": [[0.0, 4.0]]})
    assert norm == 5.0
    np.testing.assert_allclose(found["one"], [3.0 / (5.0 + 1e-6)], rtol=1e-15)
    np.testing.assert_allclose(found["two"], [[0.0, 4.0 / (5.0 + 1e-6)]], rtol=1e-15)


def test_a_gradient_within_the_bound_stays_as_it_is(gpt):
    for clip_norm in (5.1, None):
        config = gpt.package.TrainConfig(clip_norm=clip_norm)
        found, norm = clipped(gpt, config, {"one": [3.0], "two": [[0.0, 4.0]]})
        assert (found["one"].tolist(), found["two"].tolist(), norm) == ([3.0], [[0.0, 4.0]], 5.0)


def test_the_norm_tells_of_a_gradient_that_is_not_finite(gpt):
    for clip_norm in (1.0, None):
        config = gpt.package.TrainConfig(clip_norm=clip_norm)
        assert np.isnan(clipped(gpt, config, {"one": [3.0, np.nan], "two": [1.0]})[1])
        assert clipped(gpt, config, {"one": [3.0, -np.inf], "two": [1.0]})[1] == np.inf


def test_the_clip_of_optax_has_no_epsilon_and_ours_is_torchs(twins):
    gradient = {name: 1e-3 * x for name, x in numbers(1).items()}
    config = twins[0].package.TrainConfig(clip_norm=1e-4)
    (ours, norm), (torchs, _) = (clipped(gpt, config, gradient) for gpt in twins)
    transformation = optax.clip_by_global_norm(config.clip_norm)
    stock, _ = transformation.update(jax.tree.map(jnp.asarray, gradient), transformation.init(None))
    length = {name: np.abs(x).max() for name, x in torchs.items()}
    for name in SHAPES:
        assert np.abs(ours[name] - torchs[name]).max() <= BOUND * length[name]
        gap = np.abs(np.asarray(stock[name]) - torchs[name]).max() / length[name]
        assert gap == pytest.approx(1e-6 / norm, rel=1e-3) and gap > 1e-5


# --- the loss scale of float16 ---


def test_the_loss_scale_starts_and_grows_as_torchs_default_does():
    ours, stock = (
        torch_optimizer.loss_scale(torch.device("cpu")),
        torch.amp.GradScaler("cpu"),
    )
    assert (ours.get_scale(), ours.get_growth_interval()) == (65536.0, 2000)
    assert (stock.get_scale(), stock.get_growth_interval()) == (65536.0, 2000)
    assert (ours.get_growth_factor(), ours.get_backoff_factor()) == (2.0, 0.5)
    assert flax_optimizer.INITIAL_SCALE == 65536.0 and flax_optimizer.GROWTH_INTERVAL == 2000
    created = flax_optimizer.LossScale.create()
    assert (float(created.scale), created.scale.dtype) == (65536.0, "float32")


class TorchScale:
    """A GradScaler that is told whether gradients were finite."""

    def __init__(self):
        self.scaler = torch_optimizer.loss_scale(torch.device("cpu"))
        self.parameter = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.SGD([self.parameter], lr=0.0)

    def update(self, finite):
        """The scale after one gradient."""
        self.scaler.scale(torch.ones(()))
        self.parameter.grad = torch.tensor([1.0, 1.0 if finite else np.inf])
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale()


def scales(monkeypatch, flags, interval, initial=2.0**16):
    """The scales of both twins after each of some gradients."""
    for module in (flax_optimizer, torch_optimizer):
        monkeypatch.setattr(module, "GROWTH_INTERVAL", interval)
        monkeypatch.setattr(module, "INITIAL_SCALE", initial)
    flax, torchs, found = flax_optimizer.LossScale.create(), TorchScale(), []
    for finite in flags:
        flax = flax.update(jnp.asarray(finite))
        found.append((float(flax.scale), torchs.update(finite)))
    return zip(*found, strict=True)


def test_the_loss_scale_halves_at_once_and_doubles_after_enough_good_steps(monkeypatch):
    flax, torchs = scales(monkeypatch, [1, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1], 3, 8.0)
    assert flax == torchs == (8, 8, 16, 16, 16, 8, 4, 4, 4, 2, 2, 2, 4, 4)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_loss_scale_is_torchs_whatever_comes(monkeypatch, interval):
    flags = np.random.default_rng(interval).random(60) < 0.8
    flax, torchs = scales(monkeypatch, flags.tolist(), interval)
    assert flax == torchs
    assert len(set(flax)) >= 4


def test_the_loss_scale_does_not_grow_to_infinity(monkeypatch):
    flax, torchs = scales(monkeypatch, [1, 1, 1, 0, 1], 1, 2.0**126)
    assert flax == torchs == (2.0**127, 2.0**127, 2.0**127, 2.0**126, 2.0**127)
