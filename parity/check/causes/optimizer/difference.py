"""The difference between two inferred optimizers as a sentence."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from parity.check.causes.fit import Number, all_known
from parity.check.causes.optimizer.gradient import Gradient
from parity.check.causes.optimizer.reading import Reading
from parity.check.causes.optimizer.update import Update
from parity.check.null_gradients import kinds_of

Side = TypeVar("Side")
Setting = TypeVar("Setting")

# Kinds of leaves that are named; the rest is counted.
_NAMED = 3
# Digits of a number, where fewer do not tell two apart.
_DIGITS = 12


def difference(flax: Reading, torch: Reading, names: tuple[str, str]) -> str | None:
    """Describe how two optimizers differ; None where one is unknown, or nothing differs."""
    return "; ".join(_causes(dict(zip(names, (flax, torch), strict=True)))) or None


def _causes(sides: dict[str, Reading]) -> Iterator[str]:
    """Yield differences in the order of a step's computation."""
    if still := _only(sides, lambda side: not side.moves):
        yield f"{still} changes no weight"
        return
    if forgetful := _only(sides, lambda side: not side.remembers):
        yield f"{forgetful} throws its moments away after each step"
        return
    foreign = _only(sides, lambda side: side.gradient is None)
    if foreign and sides[foreign].betas is not None:
        yield f"the gradient that reaches {foreign}'s optimizer is {_composition(sides[foreign])}"
    betas = _each(sides, lambda side: side.betas)
    gradients = _each(sides, lambda side: side.gradient)
    updates = _each(sides, lambda side: side.update)
    if gradients:
        yield from _gradients(gradients)
    for index, words in enumerate(("beta1", "beta2")):
        yield from _values(words, {name: pair[index] for name, pair in (betas or {}).items()})
    if updates and betas:
        yield from _epsilons(updates)
        yield from _rates(updates, betas)
    if updates and gradients:
        yield from _decays(gradients, updates)


def _composition(side: Reading) -> str:
    """Describe a gradient that is not that of the loss."""
    if side.shares is None:
        return "not that of its loss"
    num = len(side.shares)
    used = [index for index, share in enumerate(side.shares) if not share.is_zero]
    if len(used) == 1:
        return f"that of part {used[0] + 1} of {num} of the batch alone"
    if not any(share.differs(side.shares[0]) for share in side.shares):
        return f"that of the mean over {num} parts of the batch of the mean loss of each"
    return f"another mixture of those of {num} parts of the batch than that of its loss"


def _gradients(gradients: dict[str, Gradient]) -> Iterator[str]:
    if carrier := _only(gradients, lambda gradient: gradient.carried):
        yield f"{carrier} does not set gradients to zero between steps"
    norms = _each(gradients, lambda gradient: gradient.clip_norm)
    if norms is None:
        return
    if clipping := _only(norms, lambda norm: np.isfinite(norm.value)):
        yield f"gradients are clipped to a norm of {_text(norms[clipping])} in {clipping} alone"
    else:
        yield from _values("the clip norm", norms)
        epsilons = _each(gradients, lambda gradient: gradient.clip_epsilon)
        yield from _values("the clip epsilon", epsilons)
    factors = _each(gradients, lambda gradient: gradient.factor)
    yield from _values("what gradients are multiplied by", factors)


def _epsilons(updates: dict[str, Update]) -> Iterator[str]:
    (name, update), (other, other_update) = updates.items()
    epsilons = {name: update.epsilon for name, update in updates.items()}
    if any(epsilon.is_zero for epsilon in epsilons.values()):
        yield from _values("epsilon", epsilons)
        return
    if update.inside != other_update.inside:
        inside, outside = (name, other) if update.inside else (other, name)
        yield f"epsilon is inside the root in {inside} and outside it in {outside}"
    if update.corrected != other_update.corrected:
        early = name if other_update.corrected else other
        yield f"epsilon meets the second moment in {early} before its bias is corrected"
    if update.inside == other_update.inside:
        yield from _values("epsilon", epsilons)


def _rates(
    updates: Mapping[str, Update], betas: Mapping[str, tuple[Number, Number]]
) -> Iterator[str]:
    """Relate two schedules. A missing bias correction acts as another schedule."""
    rates = {name: update.rates for name, update in updates.items()}
    (name, ours), (other, theirs) = rates.items()
    if _alike(ours, theirs):
        return
    both_ways = (name, other), (other, name)
    for side, rest in both_ways:
        beta1, beta2 = betas[side]
        counts = range(1, len(ours) + 1)
        first = [1.0 - beta1.value**count for count in counts]
        second = [(1.0 - beta2.value**count) ** -0.5 for count in counts]
        for moments, pattern in (
            ("the first moment", first),
            ("the second moment", second),
            ("either moment", [a * b for a, b in zip(first, second, strict=True)]),
        ):
            corrected = [x * Number(y) for x, y in zip(rates[rest], pattern, strict=True)]
            if _alike(rates[side], corrected):
                yield f"{side} does not correct the bias of {moments}"
                return
    for side, rest in both_ways:
        if _alike(rates[side][:-1], rates[rest][1:]):
            yield f"the schedule of {side} is one update ahead of that of {rest}"
            return
    for side, rest in both_ways:
        if rates[side][0].is_zero and not rates[rest][0].is_zero:
            yield f"the first update of {side} has a rate of zero"
            return
    ratios = [y / x for x, y in zip(ours, theirs, strict=True)]
    if _alike(ratios, ratios[:1] * len(ratios)):
        if ratios[0].value < 1.0:
            name, other, ratios = other, name, [Number(1.0) / ratios[0]]
        yield f"the rate of {other} is {_text(ratios[0])} times that of {name}"
        return
    step = next(t for t, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x.differs(y))
    yield from _values(f"the rate of update {step + 1}", {name: ours[step], other: theirs[step]})


def _decays(gradients: dict[str, Gradient], updates: dict[str, Update]) -> Iterator[str]:
    if (decays := _each(updates, lambda update: update.decay)) is None:
        return
    (name, update), (other, other_update) = updates.items()
    coupled = {x: bool(_decaying(gradients[x].decay)) for x in gradients}
    apart = {x: bool(_decaying(decays[x])) for x in decays}
    for side, rest in ((name, other), (other, name)):
        if coupled[side] and not apart[side] and apart[rest] and not coupled[rest]:
            yield f"weight decay is L2, in the gradient, in {side} and decoupled from it in {rest}"
            return
    if apart[name] and apart[other] and update.scaled != other_update.scaled:
        constant = other if update.scaled else name
        yield f"weight decay of {constant} is not multiplied by the rate"
        return
    yield from _masks("weights", decays)
    if all(coupled.values()):
        yield from _masks("weights by L2", {x: gradients[x].decay for x in gradients})
    elif side := _only(coupled, bool):
        yield f"{side} also adds weight decay to the gradient"


def _masks(words: str, decays: Mapping[str, Mapping[str, Number]]) -> Iterator[str]:
    """Compare which leaves decay, and by how much."""
    (name, ours), (other, theirs) = decays.items()
    decaying = {x: _decaying(decay) for x, decay in decays.items()}
    known = {x for x in ours if ours[x].error < float("inf") and theirs[x].error < float("inf")}
    for side, rest in ((name, other), (other, name)):
        more = [x for x in decaying[side] if x in known and x not in decaying[rest]]
        if more and not decaying[rest]:
            yield f"{words} decay by {_text(decays[side][more[0]])} in {side} and not in {rest}"
        elif more:
            yield f"{_leaves(more)} decay in {side} and not in {rest}"
    both = [x for x in decaying[name] if x in decaying[other] and ours[x].differs(theirs[x])]
    if both:
        values = {name: ours[both[0]], other: theirs[both[0]]}
        yield from _values(f"weight decay of {_leaves(both)}", values)


def _decaying(decay: Mapping[str, Number]) -> list[str]:
    return [name for name, number in decay.items() if not number.is_zero]


def _leaves(names: Iterable[str]) -> str:
    """Name leaves; layers of one kind are named once."""
    kinds = kinds_of(names)
    more = len(kinds) - _NAMED
    return ", ".join(kinds[:_NAMED]) + (f" and {more} other kinds of leaves" if more > 0 else "")


def _values(words: str, numbers: Mapping[str, Number] | None) -> Iterator[str]:
    """Describe a constant that differs, with both its values; nothing where it is unknown."""
    if not numbers:
        return
    (name, ours), (other, theirs) = numbers.items()
    if ours.differs(theirs):
        a, b = _text(ours), _text(theirs)
        if a == b:
            a, b = (f"{x.value:.{_DIGITS}g}" for x in (ours, theirs))
        yield f"{words} is {a} in {name} and {b} in {other}"


def _text(x: Number) -> str:
    """Format a number in the few digits that constants are written with."""
    return "0" if x.is_zero else f"{x.value:.6g}"


def _alike(a: Iterable[Number], b: Iterable[Number]) -> bool:
    return not any(x.differs(y) for x, y in zip(a, b, strict=True))


def _each(
    sides: Mapping[str, Side], setting: Callable[[Side], Setting | None]
) -> dict[str, Setting] | None:
    """Return one setting of both sides; None where one is unknown."""
    return all_known({name: setting(side) for name, side in sides.items()})


def _only(sides: Mapping[str, Side], holds: Callable[[Side], object]) -> str | None:
    """Return the one side of which something holds; None when it holds of both or of neither."""
    names = [name for name, side in sides.items() if holds(side)]
    return names[0] if len(names) == 1 else None
