"""Causes in the code of a port: what it does and torch does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity import check_pair


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        x = torch.sigmoid(self.inner(x))
        for _ in range(3):
            x = torch.sin(x * 1.5)
        return self.outer(x)


class Port(nnx.Module):
    """A port with a loop, which adds something in one of two places."""

    def __init__(self, before, inside):
        self.before, self.inside = before, inside
        self.inner, self.outer = (
            nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
            nnx.Linear(6, 3, rngs=nnx.Rngs(1)),
        )

    def __call__(self, x):
        x = jax.nn.sigmoid(self.inner(x) + self.before if self.before else self.inner(x))

        def step(x, _):
            x = jnp.sin(x * 1.5)
            return (x + self.inside * jnp.arange(6)[None, :] if self.inside else x), None

        return self.outer(jax.lax.scan(step, x, length=3)[0])


@pytest.mark.parametrize("before, inside", [(1.0, None), (None, 0.3)])
def test_what_a_port_adds_is_named_with_its_line(before, inside):
    report = check_pair(
        Net(),
        Port(before, inside),
        (np.random.default_rng(0).normal(size=(5, 4)),),
        levels=["weights", "logits"],
    )
    assert report.verdict == "FAIL"
    assert "flax matches to" in report.divergence.cause
    assert "x in place of x + y (add, test_program.py:" in report.divergence.cause


def test_no_cause_is_invented_for_two_faults():
    report = check_pair(
        Net(),
        Port(0.7, 0.3),
        (np.random.default_rng(0).normal(size=(5, 4)),),
        levels=["weights", "logits"],
    )
    assert report.verdict == "FAIL" and report.divergence.cause is None
