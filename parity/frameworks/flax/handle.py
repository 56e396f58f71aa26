"""Flax, as `parity.frameworks.handle` hands it out."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
import optax
from flax import nnx

from parity.frameworks import default_call
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.flax.module import FlaxUse, flax_spec
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import ModelSpec

NAME, MODULE = "flax", nnx.Module

Built = TypeVar("Built")


def spec(module: nnx.Module, use: FlaxUse) -> ModelSpec[nnx.Module, jax.Array]:
    """Return the spec of a module."""
    return flax_spec(module, use.call, use.loss, use.optimizer)


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Return what a function builds; Flax draws from streams of the user's own."""
    return build()


def initial_leaves(spec: ModelSpec[nnx.Module, jax.Array], dtype: str) -> Leaves:
    """Return the weights that a model is built with, on the CPU."""
    with jax_scope(dtype, _cpu()):
        return flax_leaves(spec.build(dtype))


def code_leaves(module: nnx.Module) -> tuple[str, ...]:
    """Return no names: what a Flax module holds is its weights."""
    return ()


def runner(spec: ModelSpec[nnx.Module, jax.Array], weights: Mapping[str, np.ndarray]) -> FlaxRunner:
    """Return a runner in float64 on the CPU."""
    return FlaxRunner(spec, weights, "float64", _cpu())


def learning_rate(module: nnx.Module, optimizer: optax.GradientTransformation | None) -> float:
    """Return the default learning rate.

    Raises:
        ValueError: for an optimizer of the user's, which does not reveal it.
    """
    if optimizer is not None:
        raise ValueError(
            "record: an optimizer of optax does not tell its learning rate. Single updates are "
            "judged in learning rates. Give learning_rate."
        )
    return default_call.LEARNING_RATE


def _cpu() -> jax.Device:
    return jax.devices("cpu")[0]
