"""What is matched: leaves of one model, alone, stacked, or side by side as the other has them."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from parity.frameworks.leaves import Leaves
from parity.frameworks.uses import Use, Uses
from parity.weights.arrange import Sides, Way, stacked, ways, with_axis
from parity.weights.known_layers import Leaf
from parity.weights.layouts import Layout, Link, Shape
from parity.weights.names import template, words

_NUMBER = re.compile(r"\d+")
# The usual order of what is fused.
_ORDERS = (
    ("query", "key", "value"),
    ("key", "value"),
    ("gate", "up"),
    ("up", "gate"),
    ("i", "f", "g", "o"),
    ("r", "z", "n"),
)
# The axis along which a named layout lies end to end, by its letter; "" for the last one.
_JOINED = {Layout.TRANSPOSED: "b", Layout.HEADS_OUT: "b", Layout.HEADS_IN: "c", Layout.FLAT: "a"}


@dataclasses.dataclass(frozen=True)
class Unit:
    """Leaves of one model that are one leaf, or several, of the other.

    Attributes:
        names: in the order of `Link`: by stack, and side by side last.
        leaf: what the first is.
        shapes: of the leaves side by side; one, unless there are several.
        order: its place in the order of use, or of definition.
        kind: what its numbers are: float, integer or complex.
        stacks: how many are stacked, for each number of the name that goes through them.
        use: how a run uses it; None where that is unknown.
    """

    names: tuple[str, ...]
    leaf: Leaf
    shapes: tuple[Shape, ...]
    order: float
    kind: str
    stacks: tuple[int, ...] = ()
    use: Use | None = None

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        each = sum(int(np.prod(shape)) for shape in self.shapes)
        return each * int(np.prod(self.stacks))

    @property
    def owner(self) -> str:
        """The path of the module that has it, or of what stands for one."""
        if self.leaf.is_known:
            above = re.sub(r"\.parametrizations\.\w+$", "", self.name.rpartition(".")[0])
            return ".".join(filter(None, (above, self.leaf.part)))
        return self.name

    @property
    def axes(self) -> tuple[str, ...]:
        """What the axes of a leaf are: by its layer, or by its use."""
        if any(self.leaf.axes) or self.use is None or len(self.leaf.axes) < 2:
            return self.leaf.axes
        return self.use.axes

    @property
    def operation(self) -> str:
        """What is done with it; see `Use`."""
        if self.leaf.is_known:
            by_role = {"bias": "term", "mean": "mean", "var": "var", "gain": "factor"}
            dense = "table" if self.leaf.kind == "embedding" else "product"
            return by_role.get(self.leaf.role, "factor" if "norm" in self.leaf.kind else dense)
        return self.use.operation if self.use else "other"


def units(names: Leaves, found: dict[str, Leaf], uses: Uses | None) -> list[Unit]:
    """Return every leaf as a unit of its own."""
    kinds = {"i": "integer", "u": "integer", "b": "integer", "c": "complex"}
    order = {name: use.order for name, use in (uses or {}).items()}
    return [
        Unit(
            (name,),
            found[name],
            (leaf.shape,),
            # What no run uses comes last.
            order.get(name, len(order) + place if order else place),
            kinds.get(leaf.dtype.kind, "float"),
            use=(uses or {}).get(name),
        )
        for place, (name, leaf) in enumerate(names.items())
    ]


def runs(found: Sequence[Unit]) -> list[frozenset[str]]:
    """Return what may be stacked: names up to numbers, starred, for one and more numbers."""
    paths = set()
    for unit in found:
        ends = [match.end() for match in _NUMBER.finditer(unit.name)]
        starred = [template(unit.name[:end]) for end in ends]
        for count in range(1, min(len(starred), 3) + 1):
            paths |= {frozenset(x) for x in itertools.combinations(starred, count)}
    return sorted(paths, key=lambda x: (len(x), sorted(x)))


def stacks_of(found: Sequence[Unit], paths: frozenset[str]) -> list[Unit]:
    """Return the units with those stacked whose names go through numbers after such paths."""
    groups: dict[tuple[object, ...], list[tuple[tuple[int, ...], Unit]]] = {}
    for unit in found:
        name, numbers, rest, start = unit.name, [], [], 0
        for match in _NUMBER.finditer(name):
            rest.append(name[start : match.start()])
            if template(name[: match.end()]) in paths and not unit.stacks:
                numbers.append(int(match[0]))
                rest.append("[]")
            else:
                rest.append(match[0])
            start = match.end()
        key = ("".join((*rest, name[start:])), unit.shapes, unit.stacks, unit.kind)
        groups.setdefault(key, []).append((tuple(numbers), unit))
    made = []
    for group in groups.values():
        group.sort(key=lambda x: x[0])
        columns = [sorted(set(x)) for x in zip(*(numbers for numbers, _ in group), strict=True)]
        is_grid = [numbers for numbers, _ in group] == list(itertools.product(*columns))
        if len(group) < 2 or not columns or not is_grid:
            made += [unit for _, unit in group]
            continue
        names = tuple(name for _, unit in group for name in unit.names)
        sizes = tuple(map(len, columns))
        made.append(dataclasses.replace(group[0][1], names=names, stacks=sizes))
    return made


def families(found: Sequence[Unit], size: int) -> Iterator[Unit]:
    """Yield siblings that have a size together, as one unit."""
    groups: dict[tuple[object, ...], list[Unit]] = {}
    for unit in found:
        if len(unit.shapes) > 1:
            continue
        steps = unit.name.split(".")
        for place in {len(steps) - 1, len(steps) - 2} & set(range(len(steps))):
            key = (place, *steps[:place], *steps[place + 1 :], unit.stacks, unit.kind)
            # A cell reads gates of the input and of the state by turns, such as ii, hi, if, hf.
            for alike in ((), unit.shapes, steps[place].strip("_")[:-1]):
                groups.setdefault((*key, alike), []).append(unit)
    for (place, *_), group in groups.items():
        group = sorted(_distinct(group), key=lambda unit: unit.order)
        for length in range(min(len(group), 8), 1, -1):
            for start in range(len(group) - length + 1):
                members = group[start : start + length]
                if sum(unit.size for unit in members) == size:
                    yield _fused(_in_usual_order(members, int(str(place))))


def is_usual(several: Unit) -> bool:
    """Whether what is side by side has the names of what is usually fused."""
    width = len(several.shapes)
    steps = zip(*(name.split(".") for name in several.names[:width]), strict=False)
    differ = next((x for x in steps if len(set(x)) == width), ())
    return any(
        all(order[i] in words(name) | {name.strip("_")[-1:]} for i, name in enumerate(differ))
        for order in _ORDERS
        if len(order) == len(differ)
    )


def _distinct(group: list[Unit]) -> list[Unit]:
    return list({unit.names: unit for unit in group}.values())


def _in_usual_order(members: list[Unit], place: int) -> list[Unit]:
    """Return members in the order in which such are usually fused, else as they are used."""
    said = [words(unit.name.split(".")[place]) | {_letter(unit, place)} for unit in members]
    for order in _ORDERS:
        places = [next((i for i, x in enumerate(order) if x in said_by), None) for said_by in said]
        if None not in places and len(set(places)) == len(members) == len(order):
            return [members[places.index(i)] for i in range(len(order))]
    return members


def _letter(unit: Unit, place: int) -> str:
    return unit.name.split(".")[place].strip("_")[-1:]


def _fused(members: Sequence[Unit]) -> Unit:
    """Return members side by side: of each step of the stacks, all of them."""
    by_step = zip(*(unit.names for unit in members), strict=True)
    return dataclasses.replace(
        members[0],
        names=tuple(name for step in by_step for name in step),
        shapes=tuple(shape for unit in members for shape in unit.shapes),
    )


def reordered(unit: Unit, order: Sequence[int]) -> Unit:
    """Return a fused unit with its members in another order."""
    width = len(unit.shapes)
    names = [unit.names[i : i + width] for i in range(0, len(unit.names), width)]
    return dataclasses.replace(
        unit,
        names=tuple(step[place] for step in names for place in order),
        shapes=tuple(unit.shapes[place] for place in order),
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """One way in which two units are the same numbers.

    Attributes:
        cost: what speaks against it, 0 for the usual one.
        layout: see `Link`.
        stacks: see `Link`.
    """

    cost: float
    layout: str
    stacks: tuple[tuple[str, int], ...] = ()

    def link(self, torch: Unit, flax: Unit) -> Link:
        """Return the link of two units."""
        return Link(torch.names, flax.names, self.layout, stacks=self.stacks)


def fits(torch: Unit, flax: Unit) -> list[Fit]:
    """Return the ways in which two units are the same numbers, the likeliest first."""
    if torch.size != flax.size or torch.kind != flax.kind:
        return []
    is_turned = "transposed convolution" in (torch.leaf.kind, flax.leaf.kind)
    if is_turned and "weight" in (torch.leaf.role, flax.leaf.role):
        return _transposed_convolutions(torch, flax)
    ours, theirs = torch.axes, flax.axes
    # A table may first be multiplied with, as a codebook is, or a head that is tied to it.
    if (torch.operation, flax.operation) == ("table", "product"):
        ours = ours[::-1]
    elif (torch.operation, flax.operation) == ("product", "table"):
        theirs = theirs[::-1]
    sides = Sides(torch.shapes[0], flax.shapes[0], ours, theirs)
    names = [("torch", f"[{x}]", size) for x, size in zip("nm", torch.stacks, strict=False)]
    names += [("flax", f"[{x}]", size) for x, size in zip("kl", flax.stacks, strict=False)]
    stacks = tuple((name, size) for _, name, size in names)
    found: dict[str, Fit] = {}
    for way in _stacked_ways(sides, names, torch, flax):
        fit = Fit(way.cost, way.layout, stacks)
        if fit.layout not in found and not _clashes(fit.link(torch, flax), torch, flax):
            found[fit.layout] = fit
    return sorted(found.values(), key=lambda fit: fit.cost)


def _stacked_ways(
    sides: Sides, names: list[tuple[str, str, int]], torch: Unit, flax: Unit
) -> Iterator[Way]:
    """Yield the ways with an axis for every stack, and one for what is fused."""
    if names:
        (framework, name, size), *rest = names
        for left, place in stacked(sides, name, size, framework):
            for way in _stacked_ways(left, rest, torch, flax):
                yield with_axis(way, name, place, framework)
        return
    for framework, unit in (("torch", torch), ("flax", flax)):
        if len(unit.shapes) > 1:
            yield from _fused_ways(sides, framework, unit.shapes)
            return
    yield from ways(sides)


def _fused_ways(sides: Sides, framework: str, shapes: tuple[Shape, ...]) -> Iterator[Way]:
    """Yield the ways in which leaves of a framework are one leaf of the other."""
    count = len(shapes)
    if len({len(shape) for shape in shapes}) > 1:
        return
    if len(set(shapes)) == 1:
        for left, place in stacked(sides, "{}", count, framework):
            yield from (with_axis(way, "{}", place, framework) for way in ways(left))
    differ = [i for i, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(differ) > 1:
        return
    whole = sides.flax if framework == "torch" else sides.torch
    first = shapes[0]
    total = sum(x[differ[0]] for x in shapes) if differ else count
    part = first[differ[0]] if differ else 1
    for place, size in enumerate(whole):
        if size * part % total:
            continue
        share = (*whole[:place], size * part // total, *whole[place + 1 :])
        cut = sides._replace(flax=share) if framework == "torch" else sides._replace(torch=share)
        for way in ways(cut):
            one, several = (way.flax, way.torch) if framework == "torch" else (way.torch, way.flax)
            if not one[place]:
                continue
            joined = one[place][0]
            along = next(i for i, group in enumerate(several) if joined in group)
            if several[along][0] != joined or (differ and along != differ[0]):
                continue
            yield _marked(way, joined)


def _marked(way: Way, joined: str) -> Way:
    """Return a way in which leaves lie end to end along an axis."""
    usual = _JOINED.get(Layout(way.layout)) if way.layout in set(Layout) else None
    last = way.flax[-1][-1] if way.flax and way.flax[-1] else ""
    if way.layout in set(Layout) and joined == (usual or last):
        return way
    torch, flax = (
        tuple(tuple(f"{x}+" if x == joined else x for x in group) for group in side)
        for side in (way.torch, way.flax)
    )
    return Way(way.cost + 0.1, torch, flax)


def _clashes(link: Link, torch: Unit, flax: Unit) -> bool:
    """Whether shapes do not allow a link."""

    def blank(unit: Unit) -> Leaves:
        shapes = itertools.cycle(unit.shapes)
        return {name: np.broadcast_to(np.int8(0), next(shapes)) for name in unit.names}

    return bool(link.misfits(blank(torch), blank(flax)))


def _transposed_convolutions(torch: Unit, flax: Unit) -> list[Fit]:
    """Return the layouts of a transposed convolution, whose window is back to front."""
    kernel = flax.leaf.axes[-2:] == ("o", "i")
    usual = Layout.CONV_TRANSPOSE_KERNEL if kernel else Layout.CONV_TRANSPOSE
    tried = [usual] if flax.leaf.is_known else [usual, Layout.CONV_TRANSPOSE_KERNEL, Layout.SAME]
    found = [Fit(0.5 * number, layout) for number, layout in enumerate(tried)]
    return [fit for fit in found if not _clashes(fit.link(torch, flax), torch, flax)]
