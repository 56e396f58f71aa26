"""Find the cause of a different output by re-running one torch module with one thing changed."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from parity.check.causes.operations import ACTIVATIONS, alternatives, common_sizes, substitutes
from parity.check.causes.replay import Change, Done, Exchange, Replay, named
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

    Args:
        session: the pair.
        probe: the inputs on which they diverge.
        found: where they do.
    """
    path = "" if found.where == session.model_name else found.where
    model = session.runs("float64")[1].module
    probes = dict.fromkeys((probe, *session.pair.probes))
    calls = (_divergent_calls(session, session.pair.probes[name], path) for name in probes)
    cause = describe_match(itertools.chain.from_iterable(calls), dict(model.named_modules()))
    return dataclasses.replace(found, cause=cause)


def describe_match(
    calls: Iterable[tuple[Replay, np.ndarray]], modules: Mapping[str, torch.nn.Module]
) -> str | None:
    """Describe the first change that makes a call produce the expected output.

    None if none does within 20 s per call.

    Args:
        calls: each with its expected output.
        modules: of the model, by path, whose weights may be the right ones.
    """
    for replay, target in calls:
        start = time.perf_counter()
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
    calls = {module: _calls(port, batch, module) for module in (divergent, model)}
    for (args, kwargs), target in zip(calls[divergent], targets, strict=False):
        inside = {
            name.removeprefix(f"{path}.") if path else name: submodule
            for name, submodule in model.named_modules()
            if name in called and name != path and (not path or name.startswith(f"{path}."))
        }
        replay = Replay(divergent, args, kwargs, inside)
        output = replay.output()
        if output is not None and float64_gap(target.output, output) is None:
            continue
        yield replay, target.output
        bare = {
            name: submodule
            for name, submodule in divergent.named_modules()
            if name not in inside and _is_bare(submodule)
        }
        if bare:
            yield Replay(divergent, args, kwargs, inside | bare), target.output
        if path and len(targets) == len(calls[model]) == 1:
            outside = {
                name: submodule
                for name, submodule in model.named_modules()
                if name in called and name and not f"{path}.".startswith(f"{name}.")
            } | {path: divergent}
            yield Replay(model, *calls[model][0], outside, divergent), target.output
        return


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether a module is only a function, as an activation."""
    return not (*module.children(), *module.parameters())


def _calls(run: TorchRunner, batch: Batch, module: torch.nn.Module) -> list[tuple[tuple, dict]]:
    """Return the arguments of each call of a module in a forward pass."""
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

        def tried(instead: Callable, number=number) -> np.ndarray | None:
            return replay.output(exchange=_at_call(number, instead))

        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        yield f"{path} left out", tried(lambda _, given, kwargs: given[0])
        if _is_bare(replay.agreeing[path]):
            for words, function in ACTIVATIONS.items():
                yield f"{words} for {path}", tried(lambda _, given, kwargs, f=function: f(given[0]))
        if inputs and not inputs[0].is_floating_point():
            for shift in (1, -1):

                def shifted(module, given, kwargs, shift=shift):
                    return module.forward((given[0] + shift).clamp(min=0), *given[1:], **kwargs)

                yield f"ids {shift:+d} for {path}", tried(shifted)
        for other, module in replay.agreeing.items():
            if other != path and type(module) is type(replay.agreeing[path]):
                yield (
                    f"{other} in place of {path}",
                    tried(lambda _, given, kwargs, module=module: module.forward(*given, **kwargs)),
                )


def _at_call(number: int, instead: Callable) -> Exchange:
    """Replace the output of one submodule call by a function of (module, args, kwargs)."""
    count = itertools.count()

    def exchange(
        _: str, module: torch.nn.Module, args: tuple, kwargs: dict, output: object
    ) -> object:
        return instead(module, args, kwargs) if next(count) == number else None

    return exchange


def _at(place: int, instead: Callable) -> Change:
    return lambda at, _: instead if at == place else None


def _at_all(places: set[int], operations: list[Done], sizes: list[int], number: int) -> Change:
    """Replace every operation of a line by the same alternative."""

    def change(at: int, _: object) -> Callable | None:
        if at not in places:
            return None
        found = itertools.islice(alternatives(operations[at], sizes), number, None)
        return next(found, (None, None))[1]

    return change
