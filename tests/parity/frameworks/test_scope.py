"""Compiled programs are forgotten before the kernel ends a process for its memory maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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


def test_a_numpy_constant_can_be_met_in_scopes_of_both_widths():
    table, cpu = np.array([1.0, 2.0, 4.0]), jax.devices("cpu")[0]

    def angles(x):
        return jnp.sin(x[..., None] * table)

    with jax.numpy_rank_promotion("allow"):
        for dtype in ("float64", "float32", "float64"):
            with scope.jax_scope(dtype, cpu):
                program = jax.jit(functools.partial(angles))
                found = scope.lowered(functools.partial(program, jnp.ones((2, 2), dtype)))
                assert found.dtype == dtype
    with pytest.raises(ValueError, match="another"):
        scope.lowered(functools.partial(int, "another"))


def test_the_share_of_maps_is_read_where_there_is_one():
    assert 0.0 <= share_of_memory_maps() < 1.0
