"""Defaults for calling a module, reducing its output to a scalar loss and training it."""

from collections.abc import Callable

import numpy as np

# AdamW's. Stated, because the frameworks' own defaults differ (weight decay: torch 1e-2, optax
# 1e-4).
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1


def projection(size: int) -> np.ndarray:
    """Return `size` fixed random weights whose dot product with an output is a scalar loss.

    The loss is about as large as one element of the output, and every element has a gradient of
    its own.
    """
    return np.random.default_rng(0).normal(size=size) / np.sqrt(size)


def call(module: Callable[..., object], *inputs: object, **keywords: object) -> object:
    """Call a module with the arguments as they are."""
    return module(*inputs, **keywords)
