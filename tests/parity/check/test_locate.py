"""Innocent modules are acquitted, and guilty ones named, in own small pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.check.locate import aligned, comparable, first_divergence, float64_gap
from parity.check.modules import check_pair
from parity.check.noise import excused
from parity.frameworks.capture import Trace
from parity.report.record import Verdict, judge

FORWARD = dict(levels=["weights", "logits"], dtypes=("float64",))


class Bent(torch.nn.Module):
    """A linear layer with its activation in one module."""

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Net(torch.nn.Module):
    """Positions of every row, a scale, and a dropout that runs in another place than in flax."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(7, 6), torch.nn.Embedding(5, 6)
        self.bent, self.norm = Bent(6), torch.nn.LayerNorm(6)
        self.dropout, self.act = torch.nn.Dropout(0.0), torch.nn.LeakyReLU(0.2)

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).expand(ids.shape)
        x = 2.0 * self.dropout(self.tokens(ids)) + self.positions(places)
        return self.norm(self.act(self.bent(x)))


class Port(nnx.Module):
    """The same in Flax, with what a fault changes."""

    def __init__(self, epsilon=1e-5, scale=2.0, slope=0.2):
        rngs = nnx.Rngs(0)
        self.tokens, self.positions = nnx.Embed(7, 6, rngs=rngs), nnx.Embed(5, 6, rngs=rngs)
        self.bent, self.norm = (
            nnx.Linear(6, 6, rngs=rngs),
            nnx.LayerNorm(6, epsilon=epsilon, rngs=rngs),
        )
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.scale, self.slope = scale, slope

    def __call__(self, ids):
        x = self.scale * self.tokens(ids) + self.positions(jnp.arange(ids.shape[1]))[None]
        return self.norm(nnx.leaky_relu(self.dropout(jnp.tanh(self.bent(x))), self.slope))


def ids(rng):
    return rng.integers(0, 7, (2, 4))


@pytest.mark.parametrize(
    "fault, where, cause",
    [
        ({}, None, ""),
        ({"epsilon": 1e-3}, "norm", "eps=0.001"),
        ({"scale": 1.0}, "Net", "a scale of 1"),
        ({"slope": 0.01}, "Net", "slope=0.01"),
    ],
)
def test_a_fault_is_placed_past_modules_that_only_look_different(fault, where, cause):
    report = check_pair(Net(), Port(**fault), ids, **FORWARD)
    if where is None:
        assert report.verdict is not Verdict.FAIL
        return
    assert report.divergence.where == where and cause in report.divergence.cause


def test_layouts_and_rows_that_fit_are_compared_and_masks_are_no_numbers():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    assert np.array_equal(aligned(x.swapaxes(1, 2), x), x)
    assert float64_gap(np.stack([x[0]] * 2), x[0]) is None
    assert float64_gap(x, x[0]) is not None
    assert not comparable(x, np.ones((2, 3), bool)) and not comparable(x, np.ones((7, 7)))


def call(path: str, x: float, y: float) -> Trace:
    return Trace(path, (np.array([x]),), np.array([y]))


def test_a_module_is_acquitted_by_its_caller_and_by_a_reader_whose_inputs_agree():
    a = [call("p.q", 1, 2), call("p", 1, 2), call("r", 2, 3), call("", 1, 3)]
    b = [call("p.q", 1, 5), call("p", 1, 2), call("r", 2, 9), call("", 1, 9)]
    assert first_divergence(a, b, float64_gap, "Model", "forward").where == "r"
    b = [call("p.q", 1, 5), call("p", 1, 5), call("r", 2, 9), call("", 1, 9)]
    reads = {("p.q", 0): {("r", 0)}, ("p", 0): {("r", 0)}}.get
    assert first_divergence(a, b, float64_gap, "Model", "forward").where == "p.q"
    found = first_divergence(a, b, float64_gap, "Model", "forward", lambda key: reads(key, ()))
    assert found.where == "r"


def test_more_than_one_caller_is_climbed_while_inputs_differ():
    a = [call("t", 1, 2), call("p.q", 2, 3), call("p", 2, 3), call("", 1, 3)]
    b = [call("t", 1, 2), call("p.q", 4, 5), call("p", 4, 5), call("", 1, 5)]
    assert first_divergence(a, b, float64_gap, "Model", "forward").where == "Model"


def test_a_value_past_its_bound_passes_only_within_what_rounding_does():
    bad = judge("leaf", "float32", "relative_l2", 3e-5, 2e-5, 1)
    assert excused(bad, lambda: 2e-5).verdict is Verdict.PASS
    assert "rounding alone moves it" in excused(bad, lambda: 2e-5).note
    assert excused(bad, lambda: 1e-7).verdict is Verdict.FAIL
    assert excused(bad, lambda: 0.0) is bad
    broken = dataclasses.replace(bad, value=float("nan"))
    assert excused(broken, lambda: 2e-5).verdict is Verdict.FAIL


class Normed(torch.nn.Module):
    def __init__(self, momentum):
        super().__init__()
        self.fc, self.bn = torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5, momentum=momentum)
        self.out = torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.out(torch.nn.functional.softplus(self.bn(self.fc(x))))


class FlaxNormed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc, self.bn = nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.softplus(self.bn(self.fc(x))))


def test_statistics_that_are_kept_otherwise_are_explained_with_the_factor():
    options = dict(levels=["optimizer"], dtypes=("float64",))
    x = np.random.default_rng(0).normal(size=(6, 4))
    report = check_pair(Normed(0.3), FlaxNormed(), x, **options)
    assert report.divergence.where.startswith("bn.")
    assert (
        "n - 1 in torch" in report.divergence.cause and "1.2 for the 6" in report.divergence.cause
    )
    assert "torch takes 0.3 of a batch" in report.divergence.cause
