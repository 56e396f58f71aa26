"""AdamW against its definition, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import flax_gpt.optimizer

SHAPES = {"matrix": (7, 5), "vector": (11,), "scalar": ()}
BOUND = 1e-12


def numbers(seed):
    """One array per parameter."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def by_definition(config, weights, gradients):
    """Loshchilov and Hutter, 2019, algorithm 2 with a constant rate: weights after each step."""
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = []
    for step, gradient in enumerate(gradients, start=1):
        new = {}
        for name, w in weights.items():
            g = gradient[name]
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            m_hat = m[name] / (1 - config.beta1**step)
            v_hat = v[name] / (1 - config.beta2**step)
            direction = m_hat / (np.sqrt(v_hat) + config.epsilon)
            new[name] = w - config.learning_rate * (direction + config.weight_decay * w)
        weights = new
        history.append(weights)
    return history


def by_twin(gpt, config, weights, gradients):
    """Weights after each step of the twin's own optimizer."""
    history = []
    if gpt.name == "flax":
        optimizer = gpt.package.adamw(config)
        parameters = {name: gpt.floats(w) for name, w in weights.items()}
        state = optimizer.init(parameters)
        for gradient in gradients:
            arrays = {name: gpt.floats(g) for name, g in gradient.items()}
            updates, state = optimizer.update(arrays, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
            history.append({name: gpt.numpy(p) for name, p in parameters.items()})
    else:
        parameters = {name: torch.nn.Parameter(gpt.floats(w)) for name, w in weights.items()}
        optimizer = gpt.package.adamw(config, parameters.values())
        for gradient in gradients:
            for name, parameter in parameters.items():
                parameter.grad = gpt.floats(gradient[name])
            optimizer.step()
            history.append({name: gpt.numpy(p).copy() for name, p in parameters.items()})
    return history


# Every constant away from its default, and an epsilon that tells inside the root from outside.
CHANGES = [
    dict(),
    dict(learning_rate=0.07, beta1=0.7, beta2=0.83, epsilon=0.3, weight_decay=0.9),
    dict(weight_decay=0.0),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_five_steps_are_those_of_the_definition(gpt, changes):
    config = gpt.package.TrainConfig(**changes)
    gradients = [numbers(seed) for seed in range(1, 6)]
    found = by_twin(gpt, config, numbers(0), gradients)
    expected = by_definition(config, numbers(0), gradients)
    for step, (x, y) in enumerate(zip(found, expected, strict=True)):
        for name in SHAPES:
            np.testing.assert_allclose(x[name], y[name], rtol=0, atol=BOUND, err_msg=f"{step}")


def test_decay_is_decoupled_from_the_gradient(gpt):
    config = gpt.package.TrainConfig(learning_rate=0.1, weight_decay=0.3)
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    history = by_twin(gpt, config, numbers(0), [zeros] * 3)
    for step, weights in enumerate(history, start=1):
        for name, weight in weights.items():
            expected = numbers(0)[name] * (1 - 0.1 * 0.3) ** step
            np.testing.assert_allclose(weight, expected, rtol=0, atol=BOUND)


def test_the_first_step_has_the_size_of_the_rate_whatever_the_gradient(gpt):
    # It is what the bias correction is for: both moments start at zero.
    config = gpt.package.TrainConfig(learning_rate=0.1, beta2=0.999, weight_decay=0.0)
    for scale in (1e-3, 1.0, 1e3):
        gradient = {name: scale * np.sign(x) for name, x in numbers(1).items()}
        (weights,) = by_twin(gpt, config, numbers(0), [gradient])
        for name, weight in weights.items():
            moved = np.abs(weight - numbers(0)[name])
            np.testing.assert_allclose(moved, 0.1, rtol=1.1 * config.epsilon / scale)


def test_the_bias_correction_of_optax_is_off_in_float32_and_ours_is_not():
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    gradient = numbers(1)["matrix"].astype("float32")
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
            ours = gap(flax_gpt.optimizer.scale_by_adam(beta1, beta2, epsilon))
    assert ours <= 4 * np.finfo("float32").eps
    assert stock > 10 * ours


def test_our_state_is_the_one_of_optax():
    gradient = {"matrix": jnp.ones((7, 5))}
    ours = flax_gpt.optimizer.scale_by_adam(0.9, 0.999, 1e-8)
    stock = optax.scale_by_adam(0.9, 0.999, 1e-8)
    states = [x.update(gradient, x.init(gradient))[1] for x in (ours, stock)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)
