"""The generators that a user's program shares with a check."""

import contextlib
import random
import sys
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch as they were, whatever runs meanwhile."""
    python, numpy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    state = torch.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(state)


def random_state() -> tuple[object, ...]:
    """Return where the generators of Python, NumPy and torch stand."""
    kind, keys, *rest = np.random.get_state()
    torch = sys.modules.get("torch")
    of_torch = torch.get_rng_state().numpy().tobytes() if torch is not None else None
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest, of_torch
