"""Find the cause of a different output by re-running one torch module with one thing changed."""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from parity.check.causes.operations import (
    ACTIVATIONS,
    alternative,
    alternatives,
    common_sizes,
    substitutes,
)
from parity.check.causes.replay import Change, Operation, Replay, named
from parity.check.causes.weights import readings
from parity.check.locate import aligned, float64_gap, translated
from parity.check.metrics import size_of
from parity.check.pair_session import PairSession
from parity.frameworks.batch import Batch
from parity.frameworks.capture import Trace, leaves_of
from parity.frameworks.torch.runner import TorchRunner
from parity.report import Divergence

# Spent at most on the search in one call; a small module's alternatives take two.
_SECONDS = 20.0


def explain_output(session: PairSession, probe: str, found: Divergence) -> Divergence:
    """Return the divergence of a forward pass with its cause, if one change closes the gap.

    The torch side is changed, whichever of the two is wrong: only the user knows which that is.
    Other inputs are tried too, because what is past the end of a table in one may be within it in
    another.
    """
    path = "" if found.where == session.model_name else found.where
    port = session.runs("float64")[1]
    probes = dict.fromkeys((probe, *session.pair.probes))
    calls = (_divergent_calls(session, session.pair.probes[name], path) for name in probes)
    with port.scope():
        modules = dict(port.module.named_modules())
        cause = describe_match(itertools.chain.from_iterable(calls), modules)
    return dataclasses.replace(found, cause=cause)


def describe_match(
    calls: Iterable[tuple[Replay, np.ndarray]], modules: Mapping[str, torch.nn.Module]
) -> str | None:
    """Describe the first change that makes a call's output as expected; None after 20 s each."""
    for replay, target in calls:
        start = time.perf_counter()
        # Of the same model: their weights may be the right ones.
        others = {name: x for name, x in modules.items() if x is not replay.module}
        for words, output in _attempts(replay, others):
            if output is not None and float64_gap(target, output) is None:
                left = size_of(target - aligned(output, target))
                return f"torch matches to {left:.0e} with {words}"
            if time.perf_counter() - start > _SECONDS:
                break
    return None


def _divergent_calls(
    session: PairSession, batch: Batch, path: str
) -> Iterator[tuple[Replay, np.ndarray]]:
    """Yield the first call of a torch module whose output diverges, and flax's output there.

    Then yield the whole model up to there, because a module may be given more than arrays, such as
    a mask inside of an object.
    """
    flax, port = session.runs("float64")
    targets: list[Trace] = []
    called: set[str] = set()

    def keep(trace: Trace) -> None:
        for known in translated([trace], session.modules):
            called.add(known.path)
            if known.path == path:
                targets.append(known)

    flax.traces(batch, keep)
    model, divergent = port.module, port.module.get_submodule(path)
    modules = {name: x for name, x in model.named_modules() if name in called}
    own, prefix = dict(divergent.named_modules()), f"{path}." if path else ""
    inside = {name: x for name, x in own.items() if name and prefix + name in called}
    bare = {name: x for name, x in own.items() if name not in inside and _is_bare(x)}
    calls = {module: _calls(port, batch, module) for module in (divergent, model)}
    for call, target in zip(calls[divergent], targets, strict=False):
        replay = Replay(divergent, *call, inside)
        output = replay.output()
        if output is not None and float64_gap(target.output, output) is None:
            continue
        yield replay, target.output
        if bare:
            yield Replay(divergent, *call, inside | bare), target.output
        if path and len(targets) == len(calls[model]) == 1:
            around = {x for x in modules if f"{path}.".startswith(f"{x}.")} | {""}
            outside = {name: x for name, x in modules.items() if name not in around}
            outside[path] = divergent
            yield Replay(model, *calls[model][0], outside, divergent), target.output
        return


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether a module is only a function, as an activation."""
    return not (*module.children(), *module.parameters())


def _calls(run: TorchRunner, batch: Batch, module: torch.nn.Module) -> list[tuple[tuple, dict]]:
    """Return the arguments of each call of a module in a forward pass."""
    calls: list[tuple[tuple, dict]] = []
    with module.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True):
        run.outputs(batch)
    return calls


def _attempts(
    replay: Replay, others: Mapping[str, torch.nn.Module]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yield the output of every change with its description; the likely ones first."""
    operations, submodule_calls = replay.operations(), replay.submodule_calls()
    sizes = common_sizes(operations)
    for place, done in enumerate(operations):
        for words, instead in alternatives(done, sizes):
            yield named(words, done.operation, done.line), replay.output(_at(place, instead))
    yield from _submodule_attempts(replay, submodule_calls)
    for words, weights in readings(replay.module, others):
        yield words, replay.output(weights=weights)
    # One line of code that runs several times, as for queries and keys.
    lines: dict[tuple[str, str], list[int]] = {}
    for place, done in enumerate(operations):
        if done.line:
            lines.setdefault((done.name, done.line), []).append(place)
    for places in lines.values():
        done = operations[places[0]]
        for number, (words, _) in enumerate(alternatives(done, sizes) if len(places) > 1 else ()):

            def change(at: int, _: object, places=places, number=number) -> Operation | None:
                return alternative(operations[at], sizes, number) if at in places else None

            yield named(words, done.operation, done.line), replay.output(change)
    at_hand = {
        f"the {side} of {path}": x
        for path, args, output in submodule_calls
        for side, values in (("input", args), ("output", output))
        for x in list(leaves_of(values))[:1]
        if isinstance(x, torch.Tensor)
    }
    for place, done in enumerate(operations):
        for words, instead in substitutes(done, at_hand):
            yield named(words, done.operation, done.line), replay.output(_at(place, instead))


def _submodule_attempts(
    replay: Replay, submodule_calls: list[tuple[str, tuple, object]]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Leave a submodule out, put another in its place, or shift its ids by one."""
    for number, (path, args, _) in enumerate(submodule_calls):

        def tried(instead: Operation, number=number) -> np.ndarray | None:
            count = itertools.count()

            def exchange(_: str, __: object, given: tuple, kwargs: dict, output: object) -> object:
                return instead(*given, **kwargs) if next(count) == number else None

            return replay.output(exchange=exchange)

        own, inputs = replay.agreeing[path], [x for x in args if isinstance(x, torch.Tensor)]
        yield f"{path} left out", tried(lambda x, *args, **kwargs: x)
        if _is_bare(own):
            for words, function in ACTIVATIONS.items():
                yield f"{words} for {path}", tried(lambda x, *args, f=function, **kwargs: f(x))
        if inputs and not inputs[0].is_floating_point():
            for shift in (1, -1):

                def shifted(x, *args, own=own, shift=shift, **kwargs):
                    return own.forward((x + shift).clamp(min=0), *args, **kwargs)

                yield f"ids {shift:+d} for {path}", tried(shifted)
        for other, module in replay.agreeing.items():
            if other != path and type(module) is type(own):
                yield f"{other} in place of {path}", tried(module.forward)


def _at(place: int, instead: Operation) -> Change:
    return lambda at, _: instead if at == place else None
