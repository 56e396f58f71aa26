"""Every way in which an array of one framework can be one of the other: by shapes and axes."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parity.weights.layouts import Layout, Shape

# Orders of axes within a product, and ways in all, that are worth trying.
_MOST_ORDERS, _MOST = 6, 24
# What an order costs that is not the usual one.
_ODD, _ODD_ORDER = 0.5, 0.25
_NAMES = "abcdefghjklm"
_NAMED = {
    "b a -> a b": Layout.TRANSPOSED,
    "(b c) a -> a b c": Layout.HEADS_OUT,
    "c (a b) -> a b c": Layout.HEADS_IN,
    "(a b) -> a b": Layout.FLAT,
    "c b a -> a b c": Layout.CONV,
    "d c a b -> a b c d": Layout.CONV,
    "e d a b c -> a b c d e": Layout.CONV,
}


class Sides(NamedTuple):
    """What an array of each framework is like.

    Attributes:
        torch: the shape of the torch leaf.
        flax: that of the flax leaf.
        torch_axes: what its axes are, as in `Use`; "" where that is unknown.
        flax_axes: the same of flax.
    """

    torch: Shape
    flax: Shape
    torch_axes: tuple[str, ...]
    flax_axes: tuple[str, ...]


class Way(NamedTuple):
    """A layout, and what speaks against it: 0 for the usual one."""

    cost: float
    torch: tuple[tuple[str, ...], ...]
    flax: tuple[tuple[str, ...], ...]

    @property
    def layout(self) -> str:
        """The text of the layout, or its name."""
        text = " -> ".join(" ".join(map(_spelled, side)) for side in (self.torch, self.flax))
        if self.torch == self.flax:
            return Layout.SAME
        return _NAMED.get(text, text)


@functools.cache
def ways(sides: Sides) -> list[Way]:
    """Return the ways in which one array can be the other, the likeliest first."""
    axes = sides.flax_axes
    if all(axes) and len(set(axes)) == len(axes) and sorted(axes) == sorted(sides.torch_axes):
        by_axis = dict(zip(axes, _NAMES, strict=False))
        sizes = [
            dict(zip(x, y, strict=True)) for x, y in ((sides[2], sides[0]), (sides[3], sides[1]))
        ]
        both = (tuple((by_axis[x],) for x in side) for side in (sides.torch_axes, axes))
        return [Way(0.0, *both)] if sizes[0] == sizes[1] else []
    torch, flax = (tuple(i for i, size in enumerate(shape) if size != 1) for shape in sides[:2])
    if sides.torch == sides.flax and len(torch) < 2:
        names = tuple((x,) for x in _NAMES[: len(sides.torch)])
        return [Way(0.0, names, names)]
    found = {}
    for blocks in _blocks(torch, flax, sides):
        for way in _ways_of(blocks, sides):
            known = found.get(way[1:])
            if known is None or way.cost < known.cost:
                found[way[1:]] = way
    return sorted(found.values(), key=lambda way: way.cost)[:_MOST]


def stacked(sides: Sides, name: str, size: int, framework: str) -> list[tuple[Sides, int]]:
    """Return the sides without an axis of a size, and its place, for each that there is.

    The leaves of `framework` have names for the axis; those of the other have the axis itself.
    """
    shape, axes = (
        (sides.flax, sides.flax_axes) if framework == "torch" else (sides.torch, sides.torch_axes)
    )
    places = [i for i, x in enumerate(shape) if x == size]
    left = []
    for place in places:
        rest = tuple(x for i, x in enumerate(shape) if i != place)
        axes_left = tuple(x for i, x in enumerate(axes) if i != place)
        if framework == "torch":
            left.append((sides._replace(flax=rest, flax_axes=axes_left), place))
        else:
            left.append((sides._replace(torch=rest, torch_axes=axes_left), place))
    return left


def with_axis(way: Way, name: str, place: int, framework: str) -> Way:
    """Return a way with one more axis at a place: the one along which `framework` has names."""
    cost = way.cost + _ODD * (place > 0)
    groups = way.flax if framework == "torch" else way.torch
    longer = (*groups[:place], (name,), *groups[place:])
    return Way(cost, way.torch, longer) if framework == "torch" else Way(cost, longer, way.flax)


def _blocks(
    torch: Sequence[int], flax: Sequence[int], sides: Sides
) -> Iterator[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Yield every way to pair axes, or products of axes, of equal size and meaning."""
    if not torch or not flax:
        if not torch and not flax:
            yield []
        return
    first, others = torch[0], torch[1:]
    for number in range(1, len(flax) + 1):
        for group in itertools.combinations(flax, number):
            if math.prod(sides.flax[x] for x in group) == sides.torch[first] and _alike(
                (first,), group, sides
            ):
                for rest in _blocks(others, [x for x in flax if x not in group], sides):
                    yield [((first,), group), *rest]
    for number in range(1, len(others) + 1):
        for group in itertools.combinations(others, number):
            size = math.prod(sides.torch[x] for x in (first, *group))
            for whole in (x for x in flax if sides.flax[x] == size):
                if _alike((first, *group), (whole,), sides):
                    left = [x for x in others if x not in group]
                    for rest in _blocks(left, [x for x in flax if x != whole], sides):
                        yield [((first, *group), (whole,)), *rest]


def _alike(torch: tuple[int, ...], flax: tuple[int, ...], sides: Sides) -> bool:
    """Whether axes mean the same, where that is known; what a window reads is summed over."""
    ours, theirs = [sides.torch_axes[x] for x in torch], [sides.flax_axes[x] for x in flax]
    if len(torch) == len(flax) == 1:
        return not ours[0] or not theirs[0] or ours == theirs
    kinds = {"i" if x[0] == "w" else x for x in (*ours, *theirs) if x}
    return len(kinds) <= 1


def _ways_of(blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], sides: Sides) -> Iterator[Way]:
    """Yield the ways to spell paired axes: every order within a product."""
    orders = []
    for ours, theirs in blocks:
        longer = theirs if len(theirs) > len(ours) else ours
        axes = sides.flax_axes if longer is theirs else sides.torch_axes
        usual = longer
        if longer is ours and any(axes[x][:1] == "w" for x in longer):
            usual = tuple(sorted(longer, key=lambda x: axes[x][:1] != "w"))  # channels last
        tried = [usual, *(x for x in itertools.permutations(longer) if x != usual)]
        orders.append(tried[:_MOST_ORDERS])
    for chosen in itertools.product(*orders):
        cost = sum(
            _ODD_ORDER * (1 + options.index(order)) if order != options[0] else 0.0
            for order, options in zip(chosen, orders, strict=True)
        )
        torch: list[tuple[str, ...]] = [() for _ in sides.torch]
        flax: list[tuple[str, ...]] = [() for _ in sides.flax]
        for number, ((ours, theirs), order) in enumerate(zip(blocks, chosen, strict=True)):
            names = tuple(f"{number}.{x}" for x in order)
            if len(theirs) > len(ours):
                torch[ours[0]] = names
                for x in theirs:
                    flax[x] = (f"{number}.{x}",)
            else:
                flax[theirs[0]] = names
                for x in ours:
                    torch[x] = (f"{number}.{x}",)
        letters = dict(zip((x for group in flax for x in group), _NAMES, strict=False))
        spelled = (tuple(tuple(letters[x] for x in y) for y in side) for side in (torch, flax))
        way = Way(cost, *spelled)
        yield way._replace(cost=cost + _unusual(way, sides))


def _unusual(way: Way, sides: Sides) -> float:
    """Return what speaks against an order of axes where their meaning does not decide."""
    ours = [x for group in way.torch for x in group]
    theirs = [x for group in way.flax for x in group]
    known = {}
    for groups, axes in ((way.torch, sides.torch_axes), (way.flax, sides.flax_axes)):
        for group, axis in zip(groups, axes, strict=True):
            known |= {x: axis for x in group if axis}
    is_known = [any(axes) for axes in (sides.torch_axes, sides.flax_axes)]
    if all(is_known) or len(theirs) < 2:
        return 0.0
    if is_known[0]:  # a parameter by hand is multiplied from the right
        order = [known.get(x, "")[:1] for x in theirs]
        inputs = [i for i, x in enumerate(order) if x in ("i", "w")]
        outputs = [i for i, x in enumerate(order) if x == "o"]
        is_usual = not inputs or not outputs or max(inputs) < min(outputs)
        return 0.0 if is_usual else _ODD
    return 0.0 if ours == theirs else _ODD


def _spelled(group: tuple[str, ...]) -> str:
    if len(group) == 1:
        return group[0]
    return f"({' '.join(group)})" if group else "1"
