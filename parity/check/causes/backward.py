"""Why a loss or a gradient parts: torch's again, with one thing done in another way."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from parity.check.causes.forward import matching
from parity.check.causes.replay import Change, Operation, Replay, named, watched
from parity.check.locate import model_name
from parity.check.metrics import relative_l2
from parity.check.pair_session import PairSession
from parity.frameworks.torch.leaves import to_numpy
from parity.report import Divergence

_PATIENCE = 20.0  # seconds to look for a cause
# As for gradients: a wrong alternative leaves a tenth or more.
_SAME = 1e-12


def explained_loss(session: PairSession, found: Divergence) -> Divergence:
    """The divergence of a loss whose outputs agree, with its cause if one alternative closes it."""
    (target, _), _ = session.gradients("float64")
    port = session.runs("float64")[1]
    loss = _Loss(port.module, session.pair.torch.loss)
    replay = Replay(loss, port.arrays(session.gradient_probe), {}, {"model": port.module})
    words = matching([(replay, np.asarray(target))], {})
    return dataclasses.replace(found, cause=words)


def explained_gradient(session: PairSession, found: Divergence) -> Divergence:
    """The divergence of a gradient, with the operation that loses or finds one.

    What is judged is the guilty module's own leaves: behind it all agrees, and what lies before it
    may have further faults.
    """
    (_, flax), _ = session.gradients("float64")
    port = session.runs("float64")[1]
    inside = "" if found.where == model_name(session) else f"{found.where}."
    judged = {name: x for name, x in flax.items() if name not in session.null_leaves}
    targets = {
        name: target
        for name, target in session.weight_map.to_torch(judged).items()
        if name.startswith(inside) and name in dict(port.module.named_parameters())
    }
    parameters = [port.module.get_parameter(name) for name in targets]
    arrays = port.arrays(session.gradient_probe)

    def gradients(change: Change) -> list[np.ndarray]:
        with watched(change), torch.enable_grad():
            loss = session.pair.torch.loss(port.module, *arrays)
        made = [None] * len(parameters)
        if loss.requires_grad:
            made = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [
            to_numpy(torch.zeros_like(x) if g is None else g)
            for x, g in zip(parameters, made, strict=True)
        ]

    start = time.perf_counter()
    for place, argument, words in _uses(gradients, parameters):
        if time.perf_counter() - start > _PATIENCE or not targets:
            break
        pairs = zip(gradients(_otherwise(place, argument)), targets.values(), strict=True)
        if all(relative_l2(made, target) <= _SAME for made, target in pairs):
            return dataclasses.replace(found, cause=f"torch matches with {words}")
    return found


def _uses(
    gradients: Callable[[Change], Any], parameters: list[torch.Tensor]
) -> list[tuple[int, int | None, str]]:
    """Operations through which a gradient goes, by place and argument, or is stopped (None).

    Those that stop one come first, then those that read a guilty weight itself.
    """
    stops, reads, others = [], [], []

    def look(place: int, operation: Operation) -> Operation:
        def run(*args: Any, **kwargs: Any) -> Any:
            name = getattr(operation, "__name__", "").strip("_")
            if name in ("detach", "detach_"):
                stops.append((place, None, named("a gradient through", operation)))
            for index, x in enumerate(args):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    kind = reads if any(x is y for y in parameters) else others
                    kind.append((place, index, named("no gradient through", operation)))
            return operation(*args, **kwargs)

        return run

    gradients(look)
    return stops + reads + others


def _otherwise(place: int, argument: int | None) -> Change:
    """A gradient let through, or stopped at one argument."""

    def change(at: int, operation: Operation) -> Operation | None:
        if at != place:
            return None
        if argument is None:
            return lambda x, *args, **kwargs: x
        return lambda *args, **kwargs: operation(
            *args[:argument], args[argument].detach(), *args[argument + 1 :], **kwargs
        )

    return change


class _Loss(torch.nn.Module):
    """A loss as a module, so that it can be replayed as one."""

    def __init__(self, model: torch.nn.Module, loss: Callable):
        super().__init__()
        self._of = lambda *arrays: loss(model, *arrays)  # no part of it, so no weights of its own

    def forward(self, *arrays: torch.Tensor) -> torch.Tensor:
        return self._of(*arrays)
