"""Tables of floats that both models hold are compared and kept; statistics are weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity.check.modules import check_pair, pair_of
from parity.check.pair_session import PairSession


class Net(torch.nn.Module):
    """A layer, waves of frequencies in a buffer, and a batch norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8)
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(8) / 8))

    def forward(self, x):
        return self.norm(self.linear(x)) * torch.cos(3 * self.inv_freq)


class Port(nnx.Module):
    """The same, with the frequencies in a variable."""

    def __init__(self, theta: float):
        rngs = nnx.Rngs(0)
        self.linear, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.norm.use_running_average = True
        self.inv_freq = nnx.Variable(jnp.exp(-jnp.log(theta) * jnp.arange(8) / 8))

    def __call__(self, x):
        return self.norm(self.linear(x)) * jnp.cos(3 * self.inv_freq[...])[None]


X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def test_a_right_table_passes_and_is_kept_while_statistics_are_drawn():
    report = check_pair(Net(), Port(10000.0), X, levels=("weights", "logits"))
    assert report.ok, report
    session = PairSession(pair_of(Net(), Port(10000.0), X))
    assert np.array_equal(session.torch_leaves["inv_freq"], Net().inv_freq.numpy())
    assert session.torch_leaves["norm.running_mean"].all()


@pytest.mark.parametrize("theta", [5000.0, 10010.0])
def test_a_wrong_table_fails_at_its_leaf(theta):
    report = check_pair(Net(), Port(theta), X, levels=("weights",))
    assert not report.ok and report.divergence.where == "inv_freq"
    assert not check_pair(Net(), Port(theta), X, levels=("logits",), dtypes=("float64",)).ok
