"""Why a module's output parts: the module again, alone, with one thing done in another way."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from parity.check.causes.operations import ACTIVATIONS, alternatives, common_sizes, substitutes
from parity.check.causes.replay import Change, Done, Exchange, Replay, named
from parity.check.causes.weights import readings
from parity.check.locate import aligned, float64_gap, model_name, translated
from parity.check.session import Session
from parity.frameworks.capture import Trace, leaves_of
from parity.frameworks.spec import Batch
from parity.frameworks.torch.runner import TorchRunner
from parity.report import Divergence

# Seconds to look for a cause in one call; a small module's alternatives take two.
_PATIENCE = 20.0


def explained_output(session: Session, probe: str, found: Divergence) -> Divergence:
    """The divergence of a forward pass with its cause, as far as one alternative closes the gap.

    The torch side is what is changed, whichever of the two is wrong: which that is, nobody but the
    user knows. Other inputs are tried too, for what is past the end of a table in one may be within
    it in another.

    Args:
        session: the pair.
        probe: the inputs on which they part.
        found: where they do.
    """
    path = "" if found.where == model_name(session) else found.where
    model = session.runs("float64")[1].module
    probes = dict.fromkeys((probe, *session.pair.probes))
    calls = (_guilty_calls(session, session.pair.probes[name], path) for name in probes)
    cause = matching(itertools.chain.from_iterable(calls), dict(model.named_modules()))
    return dataclasses.replace(found, cause=cause)


def matching(
    calls: Iterable[tuple[Replay, np.ndarray]], modules: Mapping[str, torch.nn.Module]
) -> str | None:
    """What makes a call give what it should, in words; None if nothing does, or not soon.

    Args:
        calls: each with what it should give.
        modules: of the model, by path, whose weights may be the right ones.
    """
    for replay, target in calls:
        start = time.perf_counter()
        others = {name: part for name, part in modules.items() if part is not replay.module}
        for words, output in _attempts(replay, others):
            if output is not None and float64_gap(target, output) is None:
                left = float(np.max(np.abs(target - aligned(output, target)), initial=0.0))
                return f"torch matches to {left:.0e} with {words}"
            if time.perf_counter() - start > _PATIENCE:
                break
    return None


def _guilty_calls(session: Session, batch: Batch, path: str) -> Iterator[tuple[Replay, np.ndarray]]:
    """The first call of a torch module whose output parts, and what flax's gives there.

    Then the whole model up to there, for a module may be given more than arrays, such as a mask
    inside of an object.
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
    model, guilty = port.module, port.module.get_submodule(path)
    calls = {module: _calls(port, batch, module) for module in (guilty, model)}
    for (args, kwargs), target in zip(calls[guilty], targets, strict=False):
        inside = {
            name.removeprefix(f"{path}.") if path else name: part
            for name, part in model.named_modules()
            if name in called and name != path and (not path or name.startswith(f"{path}."))
        }
        replay = Replay(guilty, args, kwargs, inside)
        output = replay.output()
        if output is not None and float64_gap(target.output, output) is None:
            continue
        yield replay, target.output
        bare = {
            name: part
            for name, part in guilty.named_modules()
            if name not in inside and _is_bare(part)
        }
        if bare:
            yield Replay(guilty, args, kwargs, inside | bare), target.output
        if path and len(targets) == len(calls[model]) == 1:
            outside = {
                name: part
                for name, part in model.named_modules()
                if name in called and name and not f"{path}.".startswith(f"{name}.")
            } | {path: guilty}
            yield Replay(model, *calls[model][0], outside, guilty), target.output
        return


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether it is a function in the form of a module, as an activation."""
    parts = *module.children(), *module.parameters()
    return not parts


def _calls(run: TorchRunner, batch: Batch, module: torch.nn.Module) -> list[tuple[tuple, dict]]:
    """What a module is given in a forward pass."""
    calls: list[tuple[tuple, dict]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        run.outputs(batch)
    finally:
        handle.remove()
    return calls


def _attempts(
    replay: Replay, others: Mapping[str, torch.nn.Module]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """What comes out of every alternative, with its words; the likely ones first."""
    operations, parts = replay.operations(), replay.parts()
    sizes = common_sizes(operations)
    for place, done in enumerate(operations):
        for words, instead in alternatives(done, sizes):
            yield named(words, done.operation, done.line), replay.output(_at(place, instead))
    yield from _part_attempts(replay, parts)
    for words, weights in readings(replay.module, others):
        yield words, replay.output(weights=weights)
    # One line of code that runs several times, as for queries and keys.
    lines = Counter((done.name, done.line) for done in operations if done.line)
    for done in operations:
        if lines.pop((done.name, done.line), 0) > 1:
            places = {
                at for at, x in enumerate(operations) if (x.name, x.line) == (done.name, done.line)
            }
            for number, (words, _) in enumerate(alternatives(done, sizes)):
                yield (
                    named(words, done.operation, done.line),
                    replay.output(_at_all(places, operations, sizes, number)),
                )
    at_hand = {
        f"the {side} of {path}": x
        for path, args, given in parts
        for side, values in (("input", args), ("output", given))
        for x in list(leaves_of(values))[:1]
        if isinstance(x, torch.Tensor)
    }
    for place, done in enumerate(operations):
        for words, instead in substitutes(done, at_hand):
            yield named(words, done.operation, done.line), replay.output(_at(place, instead))


def _part_attempts(
    replay: Replay, parts: list[tuple[str, tuple, Any]]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """A part left out, another in its place, or given ids that are off by one."""
    for number, (path, args, _) in enumerate(parts):

        def tried(instead: Callable, number=number) -> np.ndarray | None:
            return replay.output(exchange=_at_call(number, instead))

        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        yield f"{path} left out", tried(lambda _, given, kwargs: given[0])
        if _is_bare(replay.agreeing[path]):
            for words, function in ACTIVATIONS.items():
                yield f"{words} for {path}", tried(lambda _, given, kwargs, f=function: f(given[0]))
        if inputs and not inputs[0].is_floating_point():
            for shift in (1, -1):
                yield (
                    f"ids {shift:+d} for {path}",
                    tried(lambda part, given, kwargs, s=shift: part.forward(
                        (given[0] + s).clamp(min=0), *given[1:], **kwargs)),
                )  # fmt: skip
        for other, module in replay.agreeing.items():
            if other != path and type(module) is type(replay.agreeing[path]):
                yield (
                    f"{other} in place of {path}",
                    tried(lambda _, given, kwargs, module=module: module.forward(*given, **kwargs)),
                )


def _at_call(number: int, instead: Callable) -> Exchange:
    """What another function of (part, args, kwargs) gives, at one call of a part."""
    count = itertools.count()

    def exchange(_: str, part: torch.nn.Module, args: tuple, kwargs: dict, given: Any) -> Any:
        return instead(part, args, kwargs) if next(count) == number else None

    return exchange


def _at(place: int, instead: Callable) -> Change:
    return lambda at, _: instead if at == place else None


def _at_all(places: set[int], operations: list[Done], sizes: list[int], number: int) -> Change:
    """The same alternative of every operation of a line."""

    def change(at: int, _: Any) -> Callable | None:
        if at not in places:
            return None
        found = itertools.islice(alternatives(operations[at], sizes), number, None)
        return next(found, (None, None))[1]

    return change
