"""Defaults for calling a module, reducing its output to a scalar loss and training it."""

from typing import TypeVar

import numpy as np

from parity.frameworks.capture import leaves_of

ArrayT = TypeVar("ArrayT")

# AdamW's. Stated, because the frameworks' own defaults differ (weight decay: torch 1e-2, optax
# 1e-4).
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1


def projection(size: int) -> np.ndarray:
    """Return `size` fixed random weights whose dot product with an output is a scalar loss.

    The loss is about as large as one element of the output, and every element has a gradient of
    its own.
    """
    return np.random.default_rng(0).normal(size=size) / np.sqrt(size)


def arrays_in(framework: str, output: object, array_type: type[ArrayT]) -> list[ArrayT]:
    """Return the arrays in the output of a call, of which there must be one."""
    arrays = [x for x in leaves_of(output) if isinstance(x, array_type)]
    if not arrays:
        raise ValueError(
            f"{framework}: the call gave no array. A check compares arrays. Give a call that "
            "returns them."
        )
    return arrays
