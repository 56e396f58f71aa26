"""Find the cause of a different output by re-running one torch module with one thing changed."""

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from parity.check import bounds
from parity.check.causes.operations import (
    ACTIVATIONS,
    alternative,
    alternatives,
    common_sizes,
    substitutes,
)
from parity.check.causes.replay import Change, Changed, Operation, Replay, named
from parity.check.causes.weights import readings
from parity.check.locate import (
    Key,
    Noise,
    aligned,
    beyond,
    changed_inputs,
    compared_calls,
    float64_gap,
    noise_of_constants,
    together,
    translated,
)
from parity.check.metrics import max_abs, scale_of, size_of
from parity.check.pair_session import PairSession
from parity.frameworks.batch import Batch
from parity.frameworks.capture import Trace, leaves_of
from parity.frameworks.torch.runner import TorchRunner
from parity.report import Divergence

# Spent at most on the search in one call; a small module's alternatives take two.
_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A call to run again with one thing changed.

    Attributes:
        replay: of the call.
        target: the output that it should have.
        constants: that the other model holds.
        confirms: whether the model as a whole comes closer with the change of a number.
        noise: what is no difference from the target.
    """

    replay: Replay
    target: np.ndarray
    confirms: Callable[[int], bool] = lambda number: True
    noise: float = 0.0
    constants: Sequence[float] = ()

    def is_met(self, output: np.ndarray | None) -> bool:
        """Whether an output is the target."""
        return output is not None and beyond(float64_gap, self.noise)(self.target, output) is None


def explain_output(session: PairSession, batch: Batch, found: Divergence) -> Divergence:
    """Return the divergence of a forward pass with its cause, if one change closes the gap.

    The torch side is changed, whichever of the two is wrong: only the user knows which that is.
    Other inputs are tried too, because what is past the end of a table in one may be within it in
    another.
    """
    path = "" if found.where == session.model_name else found.where
    port = session.runs("float64")[1]
    others = [x for x in session.pair.probes.values() if x is not batch]
    # Taken here, for what is loaded in the port's scope would be in float64 throughout.
    tried = [(inputs, noise_of_constants(session, inputs)) for inputs in (batch, *others)]
    calls = (_suspects(session, inputs, path, noise) for inputs, noise in tried)
    with port.scope():
        modules = dict(port.module.named_modules())
        cause = describe_match(itertools.chain.from_iterable(calls), modules)
    return dataclasses.replace(found, cause=cause)


def describe_match(
    suspects: Iterable[Suspect], modules: Mapping[str, torch.nn.Module]
) -> str | None:
    """Describe the first change that makes a call's output as expected; None after 20 s each."""
    for suspect in suspects:
        start, replay, target = time.perf_counter(), suspect.replay, suspect.target
        if suspect.is_met(replay.output()):
            continue  # there is nothing to explain
        for number, changed in enumerate(
            _attempts(replay, _others(replay.module, modules), suspect.constants)
        ):
            output = replay.output(changed)
            if output is not None and suspect.is_met(output):
                if suspect.confirms(number):
                    left = size_of(target - aligned(output, target))
                    return f"torch matches to {left:.0e} with {changed.words}"
            if time.perf_counter() - start > _SECONDS:
                break
    return None


def _others(
    module: torch.nn.Module, modules: Mapping[str, torch.nn.Module]
) -> dict[str, torch.nn.Module]:
    """Return the model's other modules: their weights may be the right ones."""
    return {name: x for name, x in modules.items() if x is not module}


def _suspects(session: PairSession, batch: Batch, path: str, noise: Noise) -> Iterator[Suspect]:
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
            if known.path in (path, ""):
                targets.append(known)

    flax.traces(batch, keep)
    wholes = [x.output for x in targets if not x.path]
    targets = [x for x in targets if x.path == path]
    model, divergent = port.module, port.module.get_submodule(path)
    modules = {name: x for name, x in model.named_modules() if name in called}
    own, prefix = dict(divergent.named_modules()), f"{path}." if path else ""
    inside = {name: x for name, x in own.items() if name and prefix + name in called}
    bare = {name: x for name, x in own.items() if name not in inside and _is_bare(x)}
    calls = {module: _calls(port, batch, module) for module in (divergent, model)}
    constants = flax.constants(batch)
    for number, (call, target) in enumerate(zip(calls[divergent], targets, strict=False)):
        given, whole_given = (noise.get(x, (0.0, 0.0))[1] for x in ((path, number), ("", 0)))
        replay = Replay(divergent, *call, inside)
        suspect = Suspect(replay, target.output, noise=given, constants=constants)
        if (leaf := _divergent_leaf(suspect, target)) is None:
            continue
        suspect = dataclasses.replace(suspect, target=target.outputs.get(leaf, target.output))
        for agreeing in (inside, inside | bare) if bare else (inside,):
            key = path, number
            confirms = functools.partial(_moves_on, session, batch, key, agreeing, noise, constants)
            replay = Replay(divergent, *call, agreeing, leaf=leaf)
            yield dataclasses.replace(suspect, replay=replay, confirms=confirms)
        if path and len(targets) == len(calls[model]) == 1:
            around = {x for x in modules if f"{path}.".startswith(f"{x}.")} | {""}
            outside = {name: x for name, x in modules.items() if name not in around}
            outside[path] = divergent
            whole = Replay(model, *calls[model][0], outside)
            confirms = functools.partial(_closes, session, whole, wholes[0], whole_given, constants)
            replay = Replay(model, *calls[model][0], outside, divergent, leaf)
            yield dataclasses.replace(suspect, replay=replay, confirms=confirms)
        return


def _divergent_leaf(suspect: Suspect, target: Trace) -> str | None:
    """Return the path of the first array of a call's output that differs; None if none does."""
    found = suspect.replay.outputs()
    if not suspect.is_met(next(iter(found.values()), None)):
        return next(iter(found), "")
    both = (path for path in target.outputs if path in found)
    wanted = ((path, dataclasses.replace(suspect, target=target.outputs[path])) for path in both)
    return next((path for path, other in wanted if not other.is_met(found[path])), None)


def _closes(
    session: PairSession,
    whole: Replay,
    target: np.ndarray,
    noise: float,
    constants: Sequence[float],
    number: int,
) -> bool:
    """Whether the model's output comes closer by orders with a change of its own code."""
    changed = _again(session, whole, whole.module, constants, number)
    before, after = whole.output(), whole.output(changed)
    if before is None or after is None:
        return False
    gaps = [max_abs(*together(target, x)) for x in (before, after)]
    return gaps[1] <= max(bounds.GAP_LEFT * gaps[0], bounds.MODULE_OUTPUT * scale_of(target), noise)


def _moves_on(
    session: PairSession,
    batch: Batch,
    key: Key,
    agreeing: Mapping[str, torch.nn.Module],
    noise: Noise,
    constants: Sequence[float],
    number: int,
) -> bool:
    """Whether what reads a module agrees, or the model comes closer, with all its calls changed."""
    path, _ = key
    model = session.runs("float64")[1].module
    divergent, before = model.get_submodule(path), compared_calls(session, batch, noise)
    alone = copy.deepcopy(divergent)  # without the hooks of a capture
    inside = {name: alone.get_submodule(name) for name in agreeing}

    def instead(_: object, args: tuple, kwargs: dict[str, object], __: object) -> object:
        replay = Replay(alone, args, kwargs, inside)
        return replay.run(_again(session, replay, divergent, constants, number))

    readers = changed_inputs(session, batch, key) if path else set()
    with divergent.register_forward_hook(instead, with_kwargs=True):
        after = compared_calls(session, batch, noise)
    outside = (x for x in readers & before.keys() if not f"{x[0]}.".startswith(f"{path}."))
    if any(before[x].fed is False and after[x].fed for x in outside):
        return True
    gaps = [calls[("", 0)].gap for calls in (before, after)]
    return gaps[1] is None or (gaps[0] is not None and gaps[1] <= bounds.GAP_LEFT * gaps[0])


def _again(
    session: PairSession,
    replay: Replay,
    module: torch.nn.Module,
    constants: Sequence[float],
    number: int,
) -> Changed | None:
    """Return the change of a number for another call of a module, or of a copy of it."""
    modules = dict(session.runs("float64")[1].module.named_modules())
    found = _attempts(replay, _others(module, modules), constants)
    return next(itertools.islice(found, number, None), None)


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
    replay: Replay, others: Mapping[str, torch.nn.Module], constants: Sequence[float]
) -> Iterator[Changed]:
    """Yield every change, the likely ones first."""
    operations, submodule_calls = replay.operations(), replay.submodule_calls()
    sizes = common_sizes(operations)
    for place, done in enumerate(operations):
        for words, instead in alternatives(done, sizes, constants):
            yield Changed(named(words, done.operation, done.line), _at(place, instead))
    yield from _submodule_attempts(replay, submodule_calls)
    for words, weights in readings(replay.module, others):
        yield Changed(words, weights=weights)
    # One line of code that runs several times, as for queries and keys; then all of one operation.
    lines: dict[tuple[str, str], list[int]] = {}
    names: dict[tuple[str, str], list[int]] = {}
    for place, done in enumerate(operations):
        if done.line:
            lines.setdefault((done.name, done.line), []).append(place)
        names.setdefault((done.name, ""), []).append(place)
    tried = {tuple(x) for x in lines.values()}
    for places in [*lines.values(), *(x for x in names.values() if tuple(x) not in tried)]:
        done = operations[places[0]]
        found = alternatives(done, sizes, constants) if len(places) > 1 else ()
        for number, (words, _) in enumerate(found):

            def change(at: int, _: object, places=places, number=number) -> Operation | None:
                if at not in places:
                    return None
                return alternative(operations[at], sizes, number, constants)

            line = done.line if len({operations[x].line for x in places}) == 1 else "throughout"
            yield Changed(named(words, done.operation, line), change)
    at_hand = {
        f"the {side} of {path}": x
        for path, args, output in submodule_calls
        for side, values in (("input", args), ("output", output))
        for x in list(leaves_of(values))[:1]
        if isinstance(x, torch.Tensor)
    }
    for place, done in enumerate(operations):
        for words, instead in substitutes(done, at_hand):
            yield Changed(named(words, done.operation, done.line), _at(place, instead))


def _submodule_attempts(
    replay: Replay, submodule_calls: list[tuple[str, tuple, object]]
) -> Iterator[Changed]:
    """Leave a submodule out, put another in its place, or shift its ids by one."""
    for number, (path, args, _) in enumerate(submodule_calls):

        def tried(words: str, instead: Operation, number=number) -> Changed:
            count = itertools.count()

            def exchange(_: str, __: object, given: tuple, kwargs: dict, output: object) -> object:
                return instead(*given, **kwargs) if next(count) == number else None

            return Changed(words, exchange=exchange)

        own, inputs = replay.agreeing[path], [x for x in args if isinstance(x, torch.Tensor)]
        yield tried(f"{path} left out", lambda x, *args, **kwargs: x)
        if _is_bare(own):
            for words, function in ACTIVATIONS.items():
                yield tried(f"{words} for {path}", lambda x, *args, f=function, **kwargs: f(x))
        if inputs and not inputs[0].is_floating_point():
            for shift in (1, -1):

                def shifted(x, *args, own=own, shift=shift, **kwargs):
                    return own.forward((x + shift).clamp(min=0), *args, **kwargs)

                yield tried(f"ids {shift:+d} for {path}", shifted)
        for other, module in replay.agreeing.items():
            if other != path and type(module) is type(own):
                yield tried(f"{other} in place of {path}", module.forward)


def _at(place: int, instead: Operation) -> Change:
    return lambda at, _: instead if at == place else None
