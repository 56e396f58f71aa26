"""Find the cause of a different loss or gradient by re-running torch with one operation changed."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from parity.check import bounds
from parity.check.causes.forward import Suspect, describe_match
from parity.check.causes.operations import left_out, on_argument
from parity.check.causes.replay import Change, Operation, Replay, Watch, name_of, named
from parity.check.metrics import relative_l2
from parity.check.pair_session import PairSession
from parity.frameworks.torch.leaves import to_numpy
from parity.report import Divergence

_SECONDS = 20.0  # to look for a cause


def explain_loss(session: PairSession, found: Divergence) -> Divergence:
    """Return the divergence of a loss whose outputs agree, with its cause if a change closes it."""
    (target, _), _ = session.gradients("float64")
    port = session.runs("float64")[1]
    loss = torch.nn.Module()  # the model is no submodule, so it has no weights of its own
    loss.forward = functools.partial(session.pair.torch.loss, port.module)
    arguments = port.arguments(session.gradient_probe)
    replay = Replay(loss, *arguments, {"model": port.module})
    with port.scope():
        cause = describe_match([Suspect(replay, np.asarray(target))], {})
    return dataclasses.replace(found, cause=cause)


def explain_gradient(session: PairSession, found: Divergence) -> Divergence:
    """Return the divergence of a gradient with the operation that stops or adds one.

    Only the divergent module's own leaves are judged: all modules after it agree, and those before
    it may have further faults.
    """
    (_, flax), _ = session.gradients("float64")
    port = session.runs("float64")[1]
    inside = "" if found.where == session.model_name else f"{found.where}."
    own = dict(port.module.named_parameters())
    judged = {name: x for name, x in flax.items() if name not in session.null.leaves}
    mapped = session.weight_map.to_torch(judged)
    targets = {x: mapped[x] for x in mapped if x.startswith(inside) and x in own}
    parameters = [own[name] for name in targets]
    inputs, keywords = port.arguments(session.gradient_probe)

    def gradients(change: Change) -> list[np.ndarray]:
        with port.scope(), Watch(change), torch.enable_grad():
            loss = session.pair.torch.loss(port.module, *inputs, **keywords)
        if not loss.requires_grad:
            return [to_numpy(torch.zeros_like(x)) for x in parameters]
        made = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return [to_numpy(x) for x in made]

    def explained(change: Change) -> bool:
        pairs = zip(gradients(change), targets.values(), strict=True)
        return all(relative_l2(x, target) <= bounds.EXPLAINED_GRADIENT for x, target in pairs)

    start = time.perf_counter()
    # What float64 does not show has no cause that a replay in float64 could find.
    for place, argument, words in [] if explained(_unchanged) else _uses(gradients, parameters):
        if time.perf_counter() - start > _SECONDS:
            break
        if explained(_changed(place, argument)):
            return dataclasses.replace(found, cause=f"torch matches with {words}")
    return found


def _uses(
    gradients: Callable[[Change], object], parameters: Sequence[torch.Tensor]
) -> list[tuple[int, int | None, str]]:
    """Return places and arguments that pass a gradient; before them, places that stop one (None).

    Those that read one of the parameters come first.
    """
    stops, reads, others = [], [], []

    def look(place: int, operation: Operation) -> Operation:
        def run(*args: object, **kwargs: object) -> object:
            if name_of(operation) in ("detach", "detach_"):
                stops.append((place, None, named("a gradient through", operation)))
            for index, x in enumerate(args):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    kind = reads if any(x is y for y in parameters) else others
                    kind.append((place, index, named("no gradient through", operation)))
            return operation(*args, **kwargs)

        return run

    gradients(look)
    return stops + reads + others


def _unchanged(place: int, operation: Operation) -> None:
    """Keep an operation."""


def _changed(place: int, argument: int | None) -> Change:
    """Let a gradient through at a place, or stop it at one argument."""

    def change(at: int, operation: Operation) -> Operation | None:
        if at != place:
            return None
        if argument is None:
            return left_out
        return on_argument(argument, operation, lambda x: x.detach())

    return change
