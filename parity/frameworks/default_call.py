"""What a side does when the user does not say how its module is called or scored."""

from typing import Any

import numpy as np


def projection(size: int) -> np.ndarray:
    """Fixed random numbers that make a scalar of an output, about as large as one of its parts."""
    return np.random.default_rng(0).normal(size=size) / np.sqrt(size)


def plain_call(module: Any, *inputs: Any) -> Any:
    """How a module is called when the user does not say."""
    return module(*inputs)


def require_output(framework: str, arrays: list[Any]) -> None:
    """Refuses a call without outputs.

    Raises:
        ValueError: when there is no array.
    """
    if not arrays:
        raise ValueError(
            f"{framework}: the call gave no array. A check compares arrays. Give a call that "
            "returns them."
        )
