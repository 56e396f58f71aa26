"""What recording and checking need of Flax. Read beside parity/golden/in_torch.py."""

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.flax.module import CONSTANTS, flax_spec
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import ModelSpec

NAME = "flax"
MODULE = nnx.Module
side_of = flax_spec


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What a function builds; Flax draws from streams of its own."""
    return build()


def leaves_of_side(side: ModelSpec, dtype: str) -> Leaves:
    """The weights that a side is built with."""
    with jax_scope(dtype, _device()):
        return flax_leaves(side.build(dtype))


def leaves_of_run(run: FlaxRunner) -> Leaves:
    """The weights that a run has."""
    with jax_scope("float64", _device()):
        return flax_leaves(run.module)


def fixed(module: nnx.Module) -> tuple[str, ...]:
    """Leaves that belong to the code and not to the weights."""
    return ()


def run_of(side: ModelSpec, weights: Mapping[str, np.ndarray]) -> FlaxRunner:
    """The side in float64, on the CPU."""
    return FlaxRunner(side, weights, "float64", _device())


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"jax": jax.__version__, "flax": importlib.metadata.version("flax")}


def threads() -> int:
    """How many share the work."""
    return os.cpu_count() or 1


def _device() -> jax.Device:
    return jax.devices("cpu")[0]


def learning_rate(trainer: Any, optimizer: optax.GradientTransformation | None) -> float:
    """The largest of the optimizer.

    Raises:
        ValueError: for an optimizer of the user's, which keeps it to itself.
    """
    if optimizer is not None:
        raise ValueError(
            "record: an optimizer of optax does not tell its learning rate. Single updates are "
            "judged in learning rates. Give learning_rate."
        )
    return CONSTANTS.learning_rate
