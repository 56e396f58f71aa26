"""Optimizers beyond Adam: how two differ is named from their steps, and equal ones name nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import optim

from parity.check.causes.optimizer import Step, explain_forms

NAMES = "flax", "torch"


def gradients() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 40)) * 0.1


def start() -> np.ndarray:
    return np.random.default_rng(1).normal(size=40)


def steps_of(weights: list[np.ndarray]) -> list[Step]:
    pairs = zip(weights[:-1], weights[1:], gradients(), strict=True)
    return [Step.sampled(*({"w": x} for x in (p, q)), {}, {}, {"w": g}) for p, q, g in pairs]


def torch_steps(make) -> list[Step]:
    parameter, default = torch.nn.Parameter(torch.from_numpy(start())), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the scalars that NAdam keeps
    try:
        optimizer, seen = make([parameter]), [start()]
        for gradient in gradients():
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
            seen.append(parameter.detach().numpy().copy())
    finally:
        torch.set_default_dtype(default)
    return steps_of(seen)


def flax_steps(optimizer) -> list[Step]:
    with jax.enable_x64(True):
        parameter, seen = jnp.asarray(start()), [start()]
        state = optimizer.init(parameter)
        for gradient in gradients():
            updates, state = optimizer.update(jnp.asarray(gradient), state, parameter)
            parameter = optax.apply_updates(parameter, updates)
            seen.append(np.asarray(parameter))
    return steps_of(seen)


def rmsprop(p):
    return optim.RMSprop(p, lr=1e-2, alpha=0.99, eps=1e-3)


def sgd(p):
    return optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def decayed(*rest):
    return optax.chain(optax.add_decayed_weights(1e-3), *rest)


DIFFERENT = {
    "epsilon in the root": (
        rmsprop, optax.rmsprop(1e-2, decay=0.99, eps=1e-3), "epsilon is inside the root"),
    "another decay": (
        rmsprop, optax.rmsprop(1e-2, eps=1e-3, eps_in_sqrt=False),
        "alpha is 0.9 in flax and 0.99 in torch"),
    "another start": (
        rmsprop,
        optax.rmsprop(1e-2, decay=0.99, eps=1e-3, eps_in_sqrt=False, initial_scale=1.0),
        "the first second moment is 1 in flax and 0 in torch"),
    "no Nesterov": (
        sgd, decayed(optax.sgd(0.1, momentum=0.9)),
        "in torch alone momentum is that of Nesterov"),
    "decay after momentum": (
        sgd,
        optax.chain(optax.trace(0.9, nesterov=True), optax.add_decayed_weights(1e-3),
                    optax.scale(-0.1)),
        "in flax alone weight decay is added after the momentum"),
    "another momentum": (
        sgd, decayed(optax.sgd(0.1, momentum=0.8, nesterov=True)),
        "momentum is 0.8 in flax and 0.9 in torch"),
    "dampening": (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2), optax.sgd(0.1, momentum=0.9),
        "dampening is 0 in flax and 0.2 in torch"),
    "another rate": (
        lambda p: optim.SGD(p, lr=0.1), optax.sgd(0.01),
        "the learning rate is 0.01 in flax and 0.1 in torch"),
    "Adagrad's first sum": (
        lambda p: optim.Adagrad(p, lr=1e-2), optax.adagrad(1e-2),
        "the first sum of squares is 0.1 in flax and 0 in torch"),
    "Adagrad's epsilon": (
        lambda p: optim.Adagrad(p, lr=1e-2, eps=1e-8),
        optax.adagrad(1e-2, initial_accumulator_value=0.0, eps=1e-8),
        "in flax alone epsilon is inside the root"),
    "NAdam's schedule": (
        lambda p: optim.NAdam(p, lr=1e-2), optax.nadam(1e-2),
        "in torch alone its momentum follows a schedule"),
    "another family": (
        lambda p: optim.Adamax(p, lr=1e-2), optax.lion(1e-3, weight_decay=0.0),
        "flax steps as Lion and torch as Adamax"),
}  # fmt: skip
EQUAL = {
    "RMSprop": (
        lambda p: optim.RMSprop(p, lr=1e-2, alpha=0.99, eps=1e-3, momentum=0.9, centered=True),
        optax.rmsprop(1e-2, decay=0.99, eps=1e-3, eps_in_sqrt=False, momentum=0.9, centered=True)),
    "SGD": (sgd, decayed(optax.sgd(0.1, momentum=0.9, nesterov=True))),
    "Adadelta": (lambda p: optim.Adadelta(p, lr=1.0), optax.adadelta(1.0)),
    "Adamax": (lambda p: optim.Adamax(p, lr=1e-2), optax.adamax(1e-2)),
    "RAdam": (lambda p: optim.RAdam(p, lr=1e-2), optax.radam(1e-2)),
}  # fmt: skip


@pytest.mark.parametrize("make, optimizer, words", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_named(make, optimizer, words):
    cause = explain_forms(flax_steps(optimizer), torch_steps(make), NAMES)
    assert cause is not None and words in cause


@pytest.mark.parametrize("make, optimizer", EQUAL.values(), ids=EQUAL)
def test_equal_optimizers_have_no_cause(make, optimizer):
    assert explain_forms(flax_steps(optimizer), torch_steps(make), NAMES) is None


def test_what_no_form_explains_has_no_cause():
    """Random updates, which no optimizer makes."""
    rng = np.random.default_rng(2)
    wild = steps_of([rng.normal(size=40) for _ in range(5)])
    assert explain_forms(wild, torch_steps(sgd), NAMES) is None
