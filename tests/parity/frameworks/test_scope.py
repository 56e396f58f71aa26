"""Compiled programs are forgotten before the kernel ends a process for its memory maps."""

import jax
import jax.numpy as jnp
import pytest

from parity.frameworks.flax import scope
from parity.system.memory import share_of_memory_maps


@pytest.mark.parametrize(("share", "traced"), [(0.4, 1), (0.6, 2)])
def test_programs_are_dropped_only_when_there_are_many(monkeypatch, share, traced):
    traces = []

    @jax.jit
    def double(x):
        traces.append(1)
        return 2 * x

    double(jnp.ones(3))
    monkeypatch.setattr(scope, "share_of_memory_maps", lambda: share)
    scope.drop_programs_if_many()
    double(jnp.ones(3))
    assert len(traces) == traced


def test_the_share_of_maps_is_read_where_there_is_one():
    assert 0.0 <= share_of_memory_maps() < 1.0
