"""How a leaf of one framework lies in the other: the same numbers in another order.

Between the two is the *joined* form: flax's order of axes, with all heads in one axis. Outputs come
last in it, so that leaves that are fused in one framework and apart in the other are side by side.
"""

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from parity.frameworks.leaves import Arrays, Leaves

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Layout(enum.StrEnum):
    """Torch's axes against flax's."""

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


# Numbers of axes, in torch and in flax; of other layouts they are equal.
_AXES = {
    Layout.TRANSPOSED: (2, 2),
    Layout.HEADS_OUT: (2, 3),
    Layout.HEADS_IN: (2, 3),
    Layout.FLAT: (1, 2),
}


@dataclasses.dataclass(frozen=True)
class Link:
    """Torch leaves and the flax leaves that hold the same numbers.

    Attributes:
        torch: their names; one, unless flax fuses several.
        flax: theirs; one, unless torch fuses several.
        layout: how one lies in the other.
        heads: number of heads by which fused leaves alternate; 1 for one after the other.
    """

    torch: tuple[str, ...]
    flax: tuple[str, ...]
    layout: Layout = Layout.SAME
    heads: int = 1

    def __str__(self) -> str:
        return f"{', '.join(self.torch)} <-> {', '.join(self.flax)} ({self.layout})"

    def to_torch(self, leaves: Arrays, shapes: Shapes | None = None) -> Leaves:
        """Return the torch leaves; where there are several, their shapes are needed."""
        whole = join([from_flax(leaves[name], self.layout) for name in self.flax], self.heads)
        return {
            name: np.array(as_torch(part, self.layout), order="C", copy=None)
            for name, part in self._parts(whole, self.torch, shapes, "torch")
        }

    def to_flax(self, leaves: Arrays, shapes: Shapes | None = None) -> Leaves:
        """Return the flax leaves; shapes are needed for several, and for an axis of heads."""
        whole = join([from_torch(leaves[name], self.layout) for name in self.torch], self.heads)
        made = {}
        for name, part in self._parts(whole, self.flax, shapes, "flax"):
            leaf = part.reshape(shapes[name]) if shapes else part
            made[name] = np.array(leaf, order="C", copy=None)
        return made

    def _parts(
        self, whole: np.ndarray, names: tuple[str, ...], shapes: Shapes | None, framework: str
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield by name the parts that `join` puts side by side."""
        if len(names) == 1:
            yield names[0], whole
            return
        assert shapes is not None, f"{self}: to split a leaf needs shapes"
        widths = [joined_shape(shapes[x], self.layout, framework)[-1] for x in names]
        by_head = whole.reshape(*whole.shape[:-1], self.heads, -1)
        parts = np.split(by_head, np.cumsum(widths)[:-1] // self.heads, axis=-1)
        for name, part in zip(names, parts, strict=True):
            yield name, part.reshape(*whole.shape[:-1], -1)

    def misfits(self, torch: Arrays, flax: Arrays) -> list[str]:
        """Describe what keeps the link from working: dtypes, axes or shapes."""
        leaves, parts = [torch[x] for x in self.torch], [flax[x] for x in self.flax]
        ours, theirs = ", ".join(self.torch), ", ".join(self.flax)
        noun = "torch leaf" if len(leaves) == 1 else "torch leaves"
        if len({x.dtype for x in (*leaves, *parts)}) > 1:
            return [f"{noun} {ours} is {leaves[0].dtype}, flax {theirs} is {parts[0].dtype}"]
        axes = {(leaf.ndim, part.ndim) for leaf in leaves for part in parts}
        if not all(has_axes(self.layout, *pair) for pair in axes):
            shapes = " and ".join(str(list(x[0].shape)) for x in (leaves, parts))
            return [f"{noun} {ours} does not lie in flax {theirs} as {self.layout}: {shapes}"]
        if leaves[0].ndim == 0:
            return []
        wanted, made = (
            _side_by_side([joined_shape(x.shape, self.layout, framework) for x in group])
            for framework, group in (("torch", leaves), ("flax", parts))
        )
        if wanted is None or made is None:
            return [f"{noun} {ours} {list(leaves[0].shape)} does not line up with flax {theirs}"]
        if wanted == made:
            return []
        shape = list(as_torch(np.broadcast_to(np.int8(0), made), self.layout).shape)
        return [f"{noun} {ours} is {list(leaves[0].shape)}, flax {theirs} makes {shape}"]

    def torch_shape(self, shapes: Shapes) -> Shape:
        """Return the shape of the torch leaf, where it is one, for flax leaves of these shapes."""
        made = _side_by_side([joined_shape(shapes[x], self.layout, "flax") for x in self.flax])
        assert made is not None, f"{self} is no link of a resolved weight map"
        return as_torch(np.broadcast_to(np.int8(0), made), self.layout).shape


def from_flax(leaf: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the joined form of a flax leaf, as a view."""
    match layout:
        case Layout.HEADS_OUT:
            return leaf.reshape(leaf.shape[0], -1)
        case Layout.HEADS_IN:
            return leaf.reshape(-1, leaf.shape[-1])
        case Layout.FLAT:
            return leaf.reshape(-1)
    return leaf


def from_torch(leaf: np.ndarray, layout: Layout) -> np.ndarray:
    """Return the joined form of a torch leaf, as a view."""
    window = range(2, leaf.ndim)
    match layout:
        case Layout.TRANSPOSED | Layout.HEADS_OUT | Layout.HEADS_IN:
            return leaf.T
        case Layout.CONV | Layout.CONV_TRANSPOSE_KERNEL:
            return leaf.transpose(*window, 1, 0)
        case Layout.CONV_TRANSPOSE:
            return np.flip(leaf.transpose(*window, 0, 1), tuple(range(leaf.ndim - 2)))
    return leaf


def as_torch(joined: np.ndarray, layout: Layout) -> np.ndarray:
    """Return a torch leaf from its joined form, as a view."""
    window = range(joined.ndim - 2)
    match layout:
        case Layout.TRANSPOSED | Layout.HEADS_OUT | Layout.HEADS_IN:
            return joined.T
        case Layout.CONV | Layout.CONV_TRANSPOSE_KERNEL:
            return joined.transpose(-1, -2, *window)
        case Layout.CONV_TRANSPOSE:
            return np.flip(joined, tuple(window)).transpose(-2, -1, *window)
    return joined


def has_axes(layout: Layout, torch_axes: int, flax_axes: int) -> bool:
    """Whether leaves with these numbers of axes can lie in each other this way."""
    if layout in _AXES:
        return (torch_axes, flax_axes) == _AXES[layout]
    return torch_axes == flax_axes and (layout is Layout.SAME or flax_axes >= 3)


def joined_shape(shape: Shape, layout: Layout, framework: str) -> Shape:
    """Return the shape of the joined form of a leaf of "torch" or "flax"."""
    blank = np.broadcast_to(np.int8(0), shape)
    return (from_torch if framework == "torch" else from_flax)(blank, layout).shape


def _side_by_side(shapes: Sequence[Shape]) -> Shape | None:
    """Return the shape of arrays joined along the last axis; None when they do not line up."""
    if len({shape[:-1] for shape in shapes}) > 1:
        return None
    return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def join(parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
    """Join parts along the last axis: the first head of each, then the second of each, and on."""
    if len(parts) == 1:
        return parts[0]
    by_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
    return np.concatenate(by_head, axis=-1).reshape(*parts[0].shape[:-1], -1)
