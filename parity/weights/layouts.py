"""How a leaf of one framework lies in the other: the same numbers in another order.

A layout names the axes of both sides, torch's first:

    o i -> i o                  a linear layer
    (n h) d -> d n h            an axis of torch is two of flax, the first of them the slower
    o i h w -> (h w i) o        the other way round
    o i 1 -> i o                an axis of one element, in one of them alone
    i o ~... -> ... i o         any number of axes, back to front in torch
    o i -> [layer] i o          leaves named with [layer] in torch, stacked in flax
    (n h) d -> {} d n h         leaves listed in braces in torch, stacked in flax
    o+ i -> i o                 leaves listed in braces, end to end along o
    (n=4 o+) i -> i (n=4 o)     the same, by turns: the first fourth of each, then the second

Sizes follow from the shapes of both sides; `n=4` gives one that does not. What is usual has a name,
see `Layout`.
"""

import dataclasses
import enum
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from parity.frameworks.leaves import Arrays, Leaves

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Sizes = dict[str, int]


class Layout(enum.StrEnum):
    """Layouts with a name: torch's axes against flax's."""

    SAME = "same"
    TRANSPOSED = "transposed"  # linear: (out, in) is (in, out)
    CONV = "conv"  # any number of window axes: (out, in, *window) is (*window, in, out)
    # nnx.ConvTranspose: (in, out, *window) is (*window, in, out), the window back to front
    CONV_TRANSPOSE = "conv_transpose"
    # the same with transpose_kernel=True: (in, out, *window) is (*window, out, in)
    CONV_TRANSPOSE_KERNEL = "conv_transpose_kernel"
    HEADS_OUT = "heads_out"  # (heads * width, in) is (in, heads, width): query, key, value
    HEADS_IN = "heads_in"  # (out, heads * width) is (heads, width, out): the output projection
    FLAT = "flat"  # (heads * width) is (heads, width): biases


# Leaves that are apart in one framework lie end to end along the output.
_NAMED: dict[str, str] = {
    Layout.SAME: "... o+ -> ... o",
    Layout.TRANSPOSED: "o+ i -> i o",
    Layout.CONV: "o+ i w ... -> w ... i o",
    Layout.CONV_TRANSPOSE: "i o+ ~w ~... -> w ... i o",
    Layout.CONV_TRANSPOSE_KERNEL: "i o+ w ... -> w ... o i",
    Layout.HEADS_OUT: "(n+ h) i -> i n h",
    Layout.HEADS_IN: "o+ (n h) -> n h o",
    Layout.FLAT: "(n+ h) -> n h",
}
_BRACES, _REST = "{}", "..."
_ITEM = re.compile(r"\(([^()]*)\)|(\[\w+\]|\{\}|~?\.\.\.|[^\s()\[\]{}]+)")
_ATOM = re.compile(r"(~?)([A-Za-z_]\w*|\.\.\.)(?:=(\d+))?(\+?)|(\[\w+\]|\{\})")


@dataclasses.dataclass(frozen=True)
class Axes:
    """A layout, read: the axes of both sides, each a product of named ones.

    Attributes:
        torch: the axes of a torch leaf.
        flax: those of a flax leaf.
        sizes: of the axes that have one in the text.
        reversed: the axes that lie back to front in torch.
        joined: the axis along which leaves in braces lie end to end; "" for none.
    """

    torch: tuple[tuple[str, ...], ...]
    flax: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...] = ()
    reversed: frozenset[str] = frozenset()
    joined: str = ""

    @classmethod
    @functools.cache
    def read(cls, layout: str, heads: int = 1) -> "Axes":
        """Return the axes that a layout names; a ValueError for a text that is none."""
        text = _NAMED.get(layout, layout)
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(
                f"layout {layout!r}: no layout. There are {', '.join(Layout)}, and axes of torch "
                'and flax, as in "(n h) d -> d n h"'
            )
        sizes: Sizes = {"heads": heads} if heads > 1 else {}
        marked: dict[str, set[str]] = {"~": set(), "+": set()}
        groups = [_groups(layout, side, sizes, marked) for side in sides]
        torch, flax = groups
        if len(marked["+"]) > 1:
            raise ValueError(f"layout {layout!r}: + stands on one axis at most")
        joined = "".join(marked["+"])
        if heads > 1:
            torch, flax = (_by_turns(side, joined) for side in groups)
        names = [[x for group in side for x in group] for side in (torch, flax)]
        outer = [x for x in (*names[0], *names[1]) if x[0] in "[{"]
        plain = [sorted(x for x in side if x[0] not in "[{") for side in names]
        if plain[0] != plain[1] or any(len(set(x)) < len(x) for x in (*plain, outer)):
            raise ValueError(
                f"layout {layout!r}: every axis has one name, which stands once on either side"
            )
        return cls(torch, flax, tuple(sizes.items()), frozenset(marked["~"]), joined)

    def of(self, framework: str) -> tuple[tuple[str, ...], ...]:
        """Return the axes of a leaf of "torch" or "flax"."""
        return self.torch if framework == "torch" else self.flax

    @property
    def order(self) -> list[str]:
        """All axes, stacked ones first: the form between the two."""
        names = [x for group in (*self.torch, *self.flax) for x in group if x[0] in "[{"]
        return names + [x for group in self.flax for x in group if x[0] not in "[{"]

    def expanded(self, num_axes: int, framework: str) -> "Axes | None":
        """Return the layout for leaves with these numbers of axes; None if it is none for them."""
        groups, rest = self.of(framework), (_REST,)
        missing = num_axes - len(groups) + (rest in groups)
        if missing < 0 or (missing and rest not in groups):
            return None
        if rest not in groups:
            return self
        axes = tuple((f"{_REST}{number}",) for number in range(missing))
        torch, flax = (
            tuple(x for group in side for x in (axes if group == rest else (group,)))
            for side in (self.torch, self.flax)
        )
        turned = self.reversed - {_REST}
        if _REST in self.reversed:
            turned |= {x for (x,) in axes}
        return Axes(torch, flax, self.sizes, frozenset(turned), self.joined)


def _groups(
    layout: str, side: str, sizes: Sizes, marked: dict[str, set[str]]
) -> tuple[tuple[str, ...], ...]:
    """Read one side of a layout; fill in the sizes and the marks in it."""
    groups = []
    if _ITEM.sub("", side).strip():
        raise ValueError(f"layout {layout!r}: {_ITEM.sub('', side).strip()!r} is no axis")
    for group, item in _ITEM.findall(side):
        names = []
        for text in (group or item).split():
            found = _ATOM.fullmatch(text)
            if text == "1":
                continue
            if found is None:
                raise ValueError(f"layout {layout!r}: {text!r} is no axis")
            turned, name, size, plus, outer = found.groups()
            names.append(name or outer)
            if size and sizes.setdefault(name, int(size)) != int(size):
                raise ValueError(f"layout {layout!r}: {name} has two sizes")
            if turned:
                marked["~"].add(name)
            if plus:
                marked["+"].add(name)
        groups.append(tuple(names))
    return tuple(groups)


def _by_turns(side: tuple[tuple[str, ...], ...], joined: str) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(y for x in group for y in (("heads", x) if x == joined else (x,))) for group in side
    )


@dataclasses.dataclass(frozen=True)
class Link:
    """Torch leaves and the flax leaves that hold the same numbers.

    Attributes:
        torch: their names; one, unless flax fuses or stacks several.
        flax: theirs; one, unless torch fuses or stacks several.
        layout: how one lies in the other; see the module.
        heads: number of heads by which fused leaves alternate; 1 for one after the other.
        stacks: the axes in brackets and their sizes; names of leaves go through them in this order,
            the last one fastest, and through those in braces last.
    """

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    layout: str = Layout.SAME
    heads: int = 1
    stacks: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.torch)} <-> {', '.join(self.flax)} ({self.layout})"

    def to_torch(self, leaves: Arrays, shapes: Shapes | None = None) -> Leaves:
        """Return the torch leaves; their shapes are needed where they do not follow."""
        return self._moved("flax", "torch", leaves, shapes)

    def to_flax(self, leaves: Arrays, shapes: Shapes | None = None) -> Leaves:
        """Return the flax leaves; shapes are needed for several, and for an axis of heads."""
        return self._moved("torch", "flax", leaves, shapes)

    def misfits(self, torch: Arrays, flax: Arrays) -> list[str]:
        """Describe what keeps the link from working: dtypes, axes or shapes."""
        leaves, parts = [torch[x] for x in self.torch], [flax[x] for x in self.flax]
        ours, theirs = (_listed(x) for x in (self.torch, self.flax))
        noun = "torch leaf" if len(leaves) == 1 else "torch leaves"
        # Integers and booleans are numbers, whatever their width.
        kinds = {x.dtype if x.dtype.kind not in "iub" else None for x in (*leaves, *parts)}
        if len(kinds) > 1:
            return [f"{noun} {ours} is {leaves[0].dtype}, flax {theirs} is {parts[0].dtype}"]
        shapes = {"torch": [x.shape for x in leaves], "flax": [x.shape for x in parts]}
        try:
            self._plan(shapes)
        except _Clash as clash:
            both = " and ".join(str(list(x[0].shape)) for x in (leaves, parts))
            if len(leaves) == 1 and (made := self._made(shapes["flax"])) is not None:
                return [f"{noun} {ours} is {list(leaves[0].shape)}, flax {theirs} makes {made}"]
            return [f"{noun} {ours} does not lie in flax {theirs} as {self.layout}: {both}{clash}"]
        return []

    def torch_shape(self, shapes: Shapes) -> Shape:
        """Return the shape of the torch leaf, where it is one, for flax leaves of these shapes."""
        made = self._made([shapes[x] for x in self.flax])
        assert made is not None, f"{self} is no link of a resolved weight map"
        return tuple(made)

    def _made(self, shapes: Sequence[Shape]) -> list[int] | None:
        """Return the shape of the one torch leaf that flax leaves of these shapes make."""
        try:
            axes, sizes = self._plan({"flax": shapes})
        except _Clash:
            return None
        whole = sizes.whole
        groups = axes.torch
        if any(x not in whole for group in groups for x in group):
            return None
        return [math.prod(whole[x] for x in group) for group in groups]

    def _moved(self, source: str, target: str, leaves: Arrays, shapes: Shapes | None) -> Leaves:
        names = {"torch": self.torch, "flax": self.flax}
        known = {source: [leaves[x].shape for x in names[source]]}
        if shapes is not None:
            known[target] = [shapes[x] for x in names[target]]
        try:
            axes, sizes = self._plan(known)
        except _Clash as clash:
            given = ", ".join(str(list(shape)) for shape in known[source][:3])
            raise ValueError(
                f"{self}: no layout of leaves {given}{clash}. Mend the rule."
            ) from None
        whole = self._joined(source, axes, sizes, [leaves[x] for x in names[source]])
        return dict(zip(names[target], self._apart(target, axes, sizes, whole), strict=True))

    def _joined(
        self, framework: str, axes: Axes, sizes: "_SizesOf", leaves: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Return leaves of one framework as one array with every axis apart; a view of one leaf."""
        outer, braces = self._outer(framework, axes)
        inner = [x for group in axes.of(framework) for x in group]
        order = [x for x in axes.order if x in inner]
        seen = []
        for number, leaf in enumerate(leaves):
            apart = leaf.reshape([sizes.of(framework, number % braces, x) for x in inner])
            apart = apart.transpose([inner.index(x) for x in order])
            seen.append(_turned(apart, order, axes) if framework == "torch" else apart)
        if braces > 1 and _BRACES not in outer:
            place = order.index(axes.joined)
            groups = (seen[i : i + braces] for i in range(0, len(seen), braces))
            seen = [np.concatenate(group, axis=place) for group in groups]
        whole = np.stack(seen) if outer else seen[0]
        whole = whole.reshape((*(sizes.whole[x] for x in outer), *seen[0].shape))
        return whole.transpose([[*outer, *order].index(x) for x in axes.order])

    def _apart(
        self, framework: str, axes: Axes, sizes: "_SizesOf", whole: np.ndarray
    ) -> list[np.ndarray]:
        """Return the leaves of one framework of what `_joined` returns."""
        outer, braces = self._outer(framework, axes)
        inner = [x for group in axes.of(framework) for x in group]
        order = [x for x in axes.order if x in inner]
        parts = whole.transpose([axes.order.index(x) for x in (*outer, *order)])
        parts = parts.reshape(-1, *parts.shape[len(outer) :])
        found: list[np.ndarray] = []
        for part in parts:
            if braces > 1 and _BRACES not in outer:
                widths = [sizes.of(framework, x, axes.joined) for x in range(braces)]
                ends = np.cumsum(widths)[:-1]
                found += np.split(part, ends, axis=order.index(axes.joined))
            else:
                found.append(part)
        made = []
        for number, part in enumerate(found):
            leaf = _turned(part, order, axes) if framework == "torch" else part
            leaf = leaf.transpose([order.index(x) for x in inner])
            shape = [
                math.prod(sizes.of(framework, number % braces, x) for x in group)
                for group in axes.of(framework)
            ]
            made.append(np.array(leaf.reshape(shape), order="C", copy=None))
        return made

    def _outer(self, framework: str, axes: Axes) -> tuple[list[str], int]:
        """Return the axes along which a framework's leaves are stacked, and their number in braces.

        These are axes of the other framework's leaves.
        """
        other = axes.of("flax" if framework == "torch" else "torch")
        outer = [x for group in other for x in group if x[0] in "[{"]
        counts = dict(self.stacks)
        order = [x for x in counts if x in outer] + [x for x in outer if x == _BRACES]
        names = self.torch if framework == "torch" else self.flax
        return order, len(names) // math.prod(counts[x] for x in order if x != _BRACES)

    def _plan(self, shapes: Mapping[str, Sequence[Shape]]) -> "tuple[Axes, _SizesOf]":
        """Return the axes of leaves of these shapes, and the size of each.

        Raises:
            _Clash: when the shapes have no such axes.
        """
        axes: Axes | None = Axes.read(self.layout, self.heads)
        for framework, found in shapes.items():
            if len({len(shape) for shape in found}) > 1:
                raise _Clash(": leaves of one rule have as many axes as each other")
            assert axes is not None
            axes = self._expanded(axes, len(found[0]), framework)
            if axes is None or any(len(axes.of(framework)) != len(shape) for shape in found):
                raise _Clash("")
        assert axes is not None
        sizes = _SizesOf(self, axes)
        for framework, found in shapes.items():
            sizes.learn(framework, found)
        while sizes.learn_more():
            pass
        sizes.require_all(shapes)
        return axes, sizes

    def _expanded(self, axes: Axes, num_axes: int, framework: str) -> Axes | None:
        if self.layout == Layout.SAME and num_axes == 0:
            return Axes((), ())
        return axes.expanded(num_axes, framework)


class _Clash(ValueError):
    """Shapes that a layout does not fit; its message completes another."""


class _SizesOf:
    """The sizes of all axes of a link, as far as they are known.

    Attributes:
        whole: of the axes in the form between the two.
    """

    def __init__(self, link: Link, axes: Axes):
        self.whole: Sizes = dict(axes.sizes) | dict(link.stacks)
        self._link, self._axes = link, axes
        self._joined: dict[tuple[str, int], int] = {}  # of each leaf in braces, by framework
        self._known: list[tuple[str, int, tuple[str, ...], int]] = []
        self._braces = {x: link._outer(x, axes)[1] for x in ("torch", "flax")}
        for framework, outer in (("torch", axes.flax), ("flax", axes.torch)):
            if any(_BRACES in group for group in outer):
                self.whole[_BRACES] = self._braces[framework]

    def of(self, framework: str, number: int, axis: str) -> int:
        """Return the size of an axis in a leaf, by its place in braces."""
        if self._is_split(framework, axis):
            return self._joined[framework, number]
        return self.whole[axis]

    def learn(self, framework: str, shapes: Sequence[Shape]) -> None:
        """Note what shapes of leaves have to be."""
        for number, shape in enumerate(shapes):
            for group, size in zip(self._axes.of(framework), shape, strict=True):
                self._known.append((framework, number % self._braces[framework], group, size))

    def learn_more(self) -> bool:
        """Find the size of an axis that is alone unknown in a product; False when none is."""
        for framework, number, group, size in self._known:
            unknown = [x for x in group if self._size(framework, number, x) is None]
            if len(unknown) != 1:
                continue
            known = math.prod(
                self._size(framework, number, x) or 0 for x in group if x != unknown[0]
            )
            if not known or size % known:
                raise _Clash(f": {size} is not {' times '.join(map(self._shown, group))}")
            if self._is_split(framework, unknown[0]):
                self._joined[framework, number] = size // known
            else:
                self.whole[unknown[0]] = size // known
            return True
        joined = self._axes.joined
        for framework, braces in self._braces.items():
            parts = [self._joined.get((framework, number)) for number in range(braces)]
            if self._is_split(framework, joined) and joined not in self.whole and all(parts):
                self.whole[joined] = sum(x or 0 for x in parts)
                return True
        return False

    def require_all(self, shapes: Mapping[str, Sequence[Shape]]) -> None:
        """Refuse sizes that clash with shapes, or that nothing determines."""
        for framework, number, group, size in self._known:
            found = [self._size(framework, number, x) for x in group]
            if unknown := [x for x, y in zip(group, found, strict=True) if y is None]:
                raise _Clash(f": the size of {unknown[0]} is open, say {unknown[0]}=4")
            if math.prod(x or 0 for x in found) != size:
                raise _Clash(f": {size} is not {' times '.join(map(self._shown, group)) or 1}")
        joined = self._axes.joined
        for framework, braces in self._braces.items():
            if not self._is_split(framework, joined):
                continue
            parts = [self._joined.get((framework, number)) for number in range(braces)]
            if framework in shapes and sum(x or 0 for x in parts) != self.whole.get(joined):
                raise _Clash(f": {' + '.join(map(str, parts))} is not {self.whole.get(joined)}")
        missing = [x for x in self._axes.order if x not in self.whole]
        if missing and len(shapes) == 2:
            raise _Clash(f": the size of {missing[0]} is open, say {missing[0]}=4")

    def _is_split(self, framework: str, axis: str) -> bool:
        """Whether leaves in braces have shares of an axis."""
        return (
            bool(axis)
            and axis == self._axes.joined
            and self._braces[framework] > 1
            and _BRACES not in self.whole
        )

    def _size(self, framework: str, number: int, axis: str) -> int | None:
        if self._is_split(framework, axis):
            return self._joined.get((framework, number))
        return self.whole.get(axis)

    def _shown(self, axis: str) -> str:
        return f"{axis}={self.whole[axis]}" if axis in self.whole else axis


def _turned(array: np.ndarray, order: Sequence[str], axes: Axes) -> np.ndarray:
    """Turn the axes that lie back to front in torch."""
    if not axes.reversed:
        return array
    return np.flip(array, tuple(i for i, x in enumerate(order) if x in axes.reversed))


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more


def join(parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
    """Join parts along the last axis: the first head of each, then the second of each, and on."""
    if len(parts) == 1:
        return parts[0]
    by_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
    return np.concatenate(by_head, axis=-1).reshape(*parts[0].shape[:-1], -1)
