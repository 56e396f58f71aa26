"""Why a loss or a gradient parts: torch's again, with one thing done in another way."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from parity.causes.forward import matching
from parity.causes.replay import Replay, named, watched
from parity.compare import relative_l2
from parity.pair_subject import PairSubject
from parity.report import Divergence
from parity.torch_leaves import to_numpy

# As for gradients: a wrong alternative leaves a tenth or more.
_SAME = 1e-12


def explained_loss(subject: PairSubject, found: Divergence) -> Divergence:
    """The divergence of a loss whose outputs agree, with its cause if one alternative closes it."""
    (target, _), _ = subject.gradients("float64")
    port = subject.runs("float64")[1]
    loss = _Loss(port.module, subject.pair.torch.loss)
    replay = Replay(loss, port.arrays(subject.gradient_probe), {}, {"model": port.module})
    words = matching([(replay, np.asarray(target))], {})
    return dataclasses.replace(found, cause=words)


def explained_gradient(subject: PairSubject, leaf: str, found: Divergence) -> Divergence:
    """The divergence of a leaf's gradient, with the use of it that loses or finds a gradient.

    Args:
        subject: the pair.
        leaf: flax's name of it.
        found: where it is.
    """
    link = next(link for link in subject.weight_map.links if leaf in link.flax)
    (_, flax), _ = subject.gradients("float64")
    port, name = subject.runs("float64")[1], link.torch[0]
    parameter = port.module.get_parameter(name)
    target = subject.weight_map.to_torch(flax)[name]
    arrays = port.arrays(subject.gradient_probe)

    def gradient(change: Callable) -> np.ndarray:
        with watched(change):
            loss = subject.pair.torch.loss(port.module, *arrays)
        (made,) = torch.autograd.grad(loss, [parameter], allow_unused=True)
        return to_numpy(torch.zeros_like(parameter) if made is None else made)

    uses: list[tuple[int, str, bool]] = []

    def look(place: int, operation: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if any(x is parameter for x in (*args, *kwargs.values())):
                name = getattr(operation, "__name__", "").strip("_")
                uses.append((place, named("", operation), name in ("detach", "detach_")))
            return operation(*args, **kwargs)

        return run

    gradient(look)
    for place, where, detaches in uses:

        def change(at: int, operation: Callable, place=place, detaches=detaches):
            if at != place:
                return None
            if detaches:
                return lambda x, *args, **kwargs: x
            return lambda *args, **kwargs: operation(
                *(x.detach() if x is parameter else x for x in args),
                **{k: x.detach() if x is parameter else x for k, x in kwargs.items()},
            )

        if relative_l2(gradient(change), target) <= _SAME:
            words = "a gradient" if detaches else "no gradient"
            return dataclasses.replace(found, cause=f"torch matches with {words} through{where}")
    return found


class _Loss(torch.nn.Module):
    """A loss as a module, so that it can be replayed as one."""

    def __init__(self, model: torch.nn.Module, loss: Callable):
        super().__init__()
        self._of = lambda *arrays: loss(model, *arrays)  # no part of it, so no weights of its own

    def forward(self, *arrays: torch.Tensor) -> torch.Tensor:
        return self._of(*arrays)
