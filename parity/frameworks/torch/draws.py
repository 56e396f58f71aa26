"""Random numbers at either end of what can be drawn: what they change one time in many shows."""

import contextlib
import random
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

# A normal number is as far from zero as this one time in a billion.
_FAR = 6.0
_SHARES = {"rand", "rand_like", "bernoulli"}
_SHARES_IN_PLACE = {"uniform_", "bernoulli_"}
_NORMAL = {"randn", "randn_like", "normal"}


@contextlib.contextmanager
def draws_at(end: float) -> Iterator[None]:
    """Let functions draw the least number that they can, or for 1.0 the largest."""
    share = min(end, float(np.nextafter(np.float32(1), np.float32(0))))

    def plain(*size: int) -> object:
        return np.full(size, share) if size else share

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(random, "random", lambda: share))
        for name in ("rand", "random", "random_sample"):
            stack.enter_context(mock.patch.object(np.random, name, plain))
        stack.enter_context(_Ends(end, share))
        yield


class _Ends(TorchFunctionMode):
    """While entered, torch draws numbers from one end."""

    def __init__(self, end: float, share: float):
        super().__init__()
        self._end, self._share = end, share

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if not isinstance(made, torch.Tensor):
            return made
        if name in _SHARES | _SHARES_IN_PLACE:
            return made.fill_(self._end if "bernoulli" in name else self._share)
        return made.fill_((2 * self._end - 1) * _FAR) if name in _NORMAL else made
