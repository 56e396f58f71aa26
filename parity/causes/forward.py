"""Why a module's output parts: the module again, alone, with one thing done in another way."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from parity.capture import Trace
from parity.causes.operations import alternatives
from parity.causes.replay import Replay
from parity.causes.weights import readings
from parity.localize import aligned, float64_gap, model_name, translated
from parity.pair import Batch
from parity.report import Divergence
from parity.subject import Subject

# Seconds to look for a cause; a small module's alternatives take two.
_PATIENCE = 60.0


def explained(subject: Subject, batch: Batch, found: Divergence) -> Divergence:
    """The divergence of a forward pass with its cause, as far as one alternative closes the gap.

    The torch side is what is changed, whichever of the two is wrong: which that is, nobody but the
    user knows.
    """
    path = "" if found.where == model_name(subject) else found.where
    guilty = _guilty_call(subject, batch, path)
    if guilty is None:
        return found
    replay, target = guilty
    start = time.perf_counter()
    for words, output in _attempts(replay):
        if output is not None and float64_gap(target, output) is None:
            left = float(np.max(np.abs(target - aligned(output, target)), initial=0.0))
            cause = f"torch matches to {left:.0e} with {words}"
            return dataclasses.replace(found, cause=cause)
        if time.perf_counter() - start > _PATIENCE:
            break
    return found


def _guilty_call(subject: Subject, batch: Batch, path: str) -> tuple[Replay, np.ndarray] | None:
    """The first call of a torch module whose output parts, and what flax's gives there."""
    flax, port = subject.runs("float64")
    targets: list[Trace] = []
    called: set[str] = set()

    def keep(trace: Trace) -> None:
        for known in translated([trace], subject.modules):
            called.add(known.path)
            if known.path == path:
                targets.append(known)

    flax.traces(batch, keep)
    module = port.module.get_submodule(path)
    calls: list[tuple[tuple, dict]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        port.outputs(batch)
    finally:
        handle.remove()
    agreeing = [
        part
        for name, part in port.module.named_modules()
        if name in called and name != path and f"{name}.".startswith(f"{path}." if path else "")
    ]
    for (args, kwargs), target in zip(calls, targets, strict=False):
        replay = Replay(module, args, kwargs, agreeing)
        output = replay.output()
        if output is None or float64_gap(target.output, output) is not None:
            return replay, target.output
    return None


def _attempts(replay: Replay) -> Iterator[tuple[str, np.ndarray | None]]:
    """What comes out of every alternative, with its words."""
    for place, (operation, args, kwargs, line) in enumerate(replay.operations()):
        name = getattr(operation, "__name__", "").strip("_")
        for words, instead in alternatives(operation, args, kwargs):

            def change(at: int, _, place=place, instead=instead):
                return instead if at == place else None

            yield f"{words} ({name}, {line})", replay.output(change)
    for words, weights in readings(replay.module):
        yield words, replay.output(weights=weights)
