"""Find the cause of a different output by re-running one torch module with one thing changed."""

import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from parity.check import bounds
from parity.check.causes.numbers import fitted, held_numbers
from parity.check.causes.operations import (
    ACTIVATIONS,
    alternative,
    alternatives,
    common_sizes,
    substitutes,
)
from parity.check.causes.program import explain_by_program
from parity.check.causes.replay import Change, Changed, Done, Operation, Replay, named
from parity.check.causes.values import exchanged_values
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

# Spent at most on a search, and the share of what is left that one call to run again may take.
_SECONDS, _SHARE = 20.0, 0.6
# The change for a call like the one in which it was found; None if there is none.
ChangeOf = Callable[[Replay], Changed | None]


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A call to run again with one thing changed.

    Attributes:
        replay: of the call.
        target: the output that it should have.
        confirms: whether the model as a whole comes closer with a change.
        noise: what is no difference from the target.
        others: all arrays that the output should have, by path, as far as they are known.
    """

    replay: Replay
    target: np.ndarray
    confirms: Callable[[ChangeOf], bool] = lambda change: True
    noise: float = 0.0
    others: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def is_met(self, output: np.ndarray | None) -> bool:
        """Whether an output is the target."""
        return output is not None and beyond(float64_gap, self.noise)(self.target, output) is None

    def agreeing(self, arrays: Mapping[str, np.ndarray]) -> set[str]:
        """Return the paths of arrays that are as they should be."""
        both = (path for path in self.others if path in arrays)
        wanted = ((path, dataclasses.replace(self, target=self.others[path])) for path in both)
        return {path for path, suspect in wanted if suspect.is_met(arrays[path])}

    def mended(self, before: set[str], changed: Changed | None) -> float | None:
        """Return what is left of the gap with a change; None where it is no rounding.

        A change that spoils one of the arrays that agreed before mends nothing.
        """
        arrays = self.replay.outputs(changed)
        output = self.replay.leaf_of(arrays)
        if output is None or not self.is_met(output) or not before <= self.agreeing(arrays):
            return None
        return size_of(self.target - aligned(output, self.target))


def explain_output(session: PairSession, batch: Batch, found: Divergence) -> Divergence:
    """Return the divergence of a forward pass with its cause, if one change closes the gap.

    The torch side is changed, whichever of the two is wrong: only the user knows which that is.
    Other inputs are tried too, because what is past the end of a table in one may be within it in
    another. A cause in a layer that flax has no counterpart of is placed there.
    """
    path = "" if found.where == session.model_name else found.where
    while path and path not in session.modules.values():
        path = path.rpartition(".")[0]  # flax has no such module: what is around it has a target
    port = session.runs("float64")[1]
    others = [x for x in session.pair.probes.values() if x is not batch]
    # Taken here, for what is loaded in the port's scope would be in float64 throughout.
    tried = [(inputs, noise_of_constants(session, inputs)) for inputs in (batch, *others)]
    calls = (_suspects(session, inputs, path, noise) for inputs, noise in tried)
    with port.scope():
        modules = dict(port.module.named_modules())
        match = match_of(itertools.chain.from_iterable(calls), modules)
    if match is None:
        return explain_by_program(session, batch, found)
    cause, inside = match
    names = (name for name, module in modules.items() if module is inside)
    where = next(names, "").partition(".parametrizations.")[0]
    if where and where not in session.modules.values() and inside is not None:
        if not [*inside.children()] and [*inside.parameters(False)]:
            return dataclasses.replace(found, where=where, cause=cause)
    return dataclasses.replace(found, cause=cause)


def describe_match(
    suspects: Iterable[Suspect], modules: Mapping[str, torch.nn.Module]
) -> str | None:
    """Describe the first change that makes a call's output as expected; None after 20 s."""
    match = match_of(suspects, modules)
    return match and match[0]


def match_of(
    suspects: Iterable[Suspect], modules: Mapping[str, torch.nn.Module]
) -> tuple[str, torch.nn.Module | None] | None:
    """Return the description of such a change, and the module in which it changes an operation."""
    end = time.perf_counter() + _SECONDS
    for suspect in suspects:
        arrays = suspect.replay.outputs()
        if suspect.is_met(suspect.replay.leaf_of(arrays)):
            continue  # there is nothing to explain
        if words := _exchanged_outputs(suspect, arrays):
            return words, None
        before, now = suspect.agreeing(arrays), time.perf_counter()
        deadline = now + _SHARE * (end - now)
        for changed, change_of in _changes(suspect, modules, deadline):
            left = suspect.mended(before, changed)
            if left is not None and suspect.confirms(change_of):
                return f"torch matches to {left:.0e} with {changed.words}", changed.inside
            if time.perf_counter() > deadline:
                break
    return None


def _changes(
    suspect: Suspect, modules: Mapping[str, torch.nn.Module], deadline: float
) -> Iterator[tuple[Changed, ChangeOf]]:
    """Yield the changes to try, and how to make each of them for another call."""
    replay = suspect.replay
    others = _others(replay.module, modules)

    def numbered(
        attempts: Callable[[Replay, Mapping[str, torch.nn.Module]], Iterator[Changed]],
    ) -> Iterator[tuple[Changed, ChangeOf]]:
        for number, changed in enumerate(attempts(replay, others)):

            def again(other: Replay, number: int = number) -> Changed | None:
                return next(itertools.islice(attempts(other, others), number, None), None)

            yield changed, again

    yield from numbered(_attempts)
    # Half of the time that is left, so that all get some.
    half = (time.perf_counter() + deadline) / 2
    for changed in fitted(replay, suspect.target, half):
        yield changed, lambda other, changed=changed: changed
    yield from numbered(_weights)
    for changed in exchanged_values(replay.operations()):
        yield changed, lambda other, changed=changed: changed


def _exchanged_outputs(suspect: Suspect, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Describe two outputs that stand in each other's place; None if there are none."""
    agreeing = suspect.agreeing(arrays)
    left = [path for path in suspect.others if path in arrays and path not in agreeing]
    for a, b in itertools.combinations(left, 2):
        if {a, b} <= suspect.agreeing({a: arrays[b], b: arrays[a]}):
            return f"torch matches with outputs {a} and {b} exchanged"
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
    wholes = [x for x in targets if not x.path]
    targets = [x for x in targets if x.path == path]
    model, divergent = port.module, port.module.get_submodule(path)
    modules = {name: x for name, x in model.named_modules() if name in called}
    own, prefix = dict(divergent.named_modules()), f"{path}." if path else ""
    unlike = _unlike(session, batch, noise)
    inside = {
        name: x
        for name, x in own.items()
        if name and prefix + name in called and prefix + name not in unlike
    }
    bare = {name: x for name, x in own.items() if name not in inside and _is_bare(x)}
    calls = {module: _calls(port, batch, module) for module in (divergent, model)}
    for number, (call, target) in enumerate(zip(calls[divergent], targets, strict=False)):
        given, whole_given = (noise.get(x, (0.0, 0.0))[1] for x in ((path, number), ("", 0)))
        suspect = Suspect(Replay(divergent, *call, inside), target.output, noise=given)
        if (leaf := _divergent_leaf(suspect, target)) is None:
            continue
        suspect = dataclasses.replace(
            suspect, target=target.outputs.get(leaf, target.output), others=target.outputs
        )
        for agreeing in (inside, inside | bare) if bare else (inside,):
            confirms = functools.partial(_moves_on, session, batch, (path, number), agreeing, noise)
            if not path:
                confirms = functools.partial(_holds, session, agreeing, leaf, given)
            replay = Replay(divergent, *call, agreeing, leaf=leaf)
            yield dataclasses.replace(suspect, replay=replay, confirms=confirms)
        if path and len(targets) == len(calls[model]) == 1:
            around = {x for x in modules if f"{path}.".startswith(f"{x}.")} | {""}
            outside = {name: x for name, x in modules.items() if name not in around}
            outside[path] = divergent
            whole = Replay(model, *calls[model][0], outside)
            confirms = functools.partial(_closes, whole, wholes[0].output, whole_given)
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


def _unlike(session: PairSession, batch: Batch, noise: Noise) -> set[str]:
    """Return the modules of which not all outputs can be compared: their code may be the cause."""
    found = compared_calls(session, batch, noise)
    return {call.path for call in found.values() if call.shapes or call.more}


def _holds(
    session: PairSession,
    agreeing: Mapping[str, torch.nn.Module],
    leaf: str,
    noise: float,
    change_of: ChangeOf,
) -> bool:
    """Whether a change of the model's own code makes outputs right for other inputs too."""
    batch, (flax, port) = session.pair.training_batch(1), session.runs("float64")
    targets: list[Trace] = []
    flax.traces(batch, lambda trace: None if trace.path else targets.append(trace))
    calls = _calls(port, batch, port.module)
    if len(targets) != 1 or len(calls) != 1:
        return True
    replay = Replay(port.module, *calls[0], agreeing, leaf=leaf)
    target = targets[0].outputs.get(leaf, targets[0].output)
    suspect = Suspect(replay, target, noise=noise, others=targets[0].outputs)
    return suspect.mended(suspect.agreeing(replay.outputs()), change_of(replay)) is not None


def _closes(whole: Replay, target: np.ndarray, noise: float, change_of: ChangeOf) -> bool:
    """Whether the model's output comes closer by orders with a change of its own code."""
    before, after = whole.output(), whole.output(change_of(whole))
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
    change_of: ChangeOf,
) -> bool:
    """Whether what reads a module agrees, or the model comes closer, with all its calls changed."""
    path, _ = key
    model = session.runs("float64")[1].module
    divergent, before = model.get_submodule(path), compared_calls(session, batch, noise)
    alone = copy.deepcopy(divergent)  # without the hooks of a capture
    inside = {name: alone.get_submodule(name) for name in agreeing}

    def instead(_: object, args: tuple, kwargs: dict[str, object], __: object) -> object:
        replay = Replay(alone, args, kwargs, inside)
        return replay.run(change_of(replay))

    readers = changed_inputs(session, batch, key)
    with divergent.register_forward_hook(instead, with_kwargs=True):
        after = compared_calls(session, batch, noise)
    outside = (x for x in readers & before.keys() if not f"{x[0]}.".startswith(f"{path}."))
    if any(before[x].fed is False and after[x].fed for x in outside):
        return True
    gaps = [calls[("", 0)].gap for calls in (before, after)]
    return gaps[1] is None or (gaps[0] is not None and gaps[1] <= bounds.GAP_LEFT * gaps[0])


def _is_bare(module: torch.nn.Module) -> bool:
    """Whether a module is only a function, as an activation."""
    return not (*module.children(), *module.parameters())


def _calls(run: TorchRunner, batch: Batch, module: torch.nn.Module) -> list[tuple[tuple, dict]]:
    """Return the arguments of each call of a module in a forward pass."""
    calls: list[tuple[tuple, dict]] = []
    with module.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True):
        run.outputs(batch)
    return calls


def _attempts(replay: Replay, others: Mapping[str, torch.nn.Module]) -> Iterator[Changed]:
    """Yield every change, the likely ones first."""
    operations, submodule_calls = replay.operations(), replay.submodule_calls()
    sizes = common_sizes(operations)

    def changed(words: str, done: Done, change: Change) -> Changed:
        return Changed(named(words, done.operation, done.line), change, inside=done.inside)

    for place, done in enumerate(operations):
        for words, instead in alternatives(done, sizes):
            yield changed(words, done, _at(place, instead))
    yield from _submodule_attempts(replay, submodule_calls)
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

            yield changed(words, done, change)
    held = [*replay.module.modules(), *others.values()]
    for place, done in enumerate(operations):
        for words, instead in held_numbers(done, held):
            yield changed(words, done, _at(place, instead))
    at_hand = {
        f"the {side} of {path}": x
        for path, args, output in submodule_calls
        for side, values in (("input", args), ("output", output))
        for x in list(leaves_of(values))[:1]
        if isinstance(x, torch.Tensor)
    }
    for place, done in enumerate(operations):
        for words, instead in substitutes(done, at_hand):
            yield changed(words, done, _at(place, instead))


def _weights(replay: Replay, others: Mapping[str, torch.nn.Module]) -> Iterator[Changed]:
    """Yield every change of weights."""
    for words, weights in readings(replay.module, others):
        yield Changed(words, weights=weights)


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
        yield tried(f"{path} twice", lambda x, *args, own=own, **k: own(own(x, *args, **k)))
        if _is_bare(own):
            for words, function in ACTIVATIONS.items():
                yield tried(f"{words} for {path}", lambda x, *args, f=function, **kwargs: f(x))
        if inputs and not inputs[0].is_floating_point():
            least = int(inputs[0].min()) if inputs[0].numel() else 0
            for shift in dict.fromkeys((1, -1, -least) if least else (1, -1)):

                def shifted(x, *args, own=own, shift=shift, **kwargs):
                    return own.forward((x + shift).clamp(min=0), *args, **kwargs)

                yield tried(f"ids {shift:+d} for {path}", shifted)
        for other, module in replay.agreeing.items():
            if other != path and type(module) is type(own):
                yield tried(f"{other} in place of {path}", module.forward)


def _at(place: int, instead: Operation) -> Change:
    return lambda at, _: instead if at == place else None
