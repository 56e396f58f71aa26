"""How a forward pass of a PyTorch module uses each weight, from the functions it calls."""

from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode

from parity.frameworks.uses import Use, Uses, einsum_axes

# What passes a tensor on as it is, in another type or memory.
_COPIES = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"}
_FACTORS = {"mul", "div", "true_divide", "prelu", "__mul__", "__rmul__", "multiply"}
_TERMS = {"add", "sub", "__add__", "__radd__", "__sub__", "__rsub__"}


def torch_uses(module: torch.nn.Module, call: Callable[[], object]) -> Uses:
    """Run `call` and return the first use of every parameter and buffer of a module."""
    watch = _Watch(module)
    with watch, torch.no_grad():
        call()
    return watch.uses


class _Watch(TorchFunctionMode):
    """Notes the first function that reads each leaf, or a view or copy of it."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.uses: Uses = {}
        # By memory, with the strides and sizes that its axes have there.
        self._leaves: dict[int, tuple[str, list[tuple[int, int]]]] = {}
        self._kept: list[torch.Tensor] = []  # memory that is free is used again
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.numel():
                self._leaves.setdefault(_memory(tensor), (name, _axes(tensor)))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        results = [x for x in _tensors((output,)) if x.numel()]
        name = getattr(func, "__name__", "")
        given = list(enumerate(_flat((*args, *kwargs.values()))))
        for place, tensor in given if results else ():
            if not isinstance(tensor, torch.Tensor):
                continue
            found = self._leaves.get(_memory(tensor))
            if found is None or any(_memory(x) == _memory(tensor) for x in results):
                continue
            if name in _COPIES and results[0].shape == tensor.shape:
                self._leaves[_memory(results[0])] = (
                    found[0],
                    self._copied(found, tensor, results[0]),
                )
                self._kept.append(results[0])
            elif found[0] not in self.uses:
                keyword = dict(zip(range(len(args), len(args) + len(kwargs)), kwargs, strict=False))
                operation, axes = _use(name, args, place, keyword.get(place, ""), tensor)
                order = len(self.uses)
                self.uses[found[0]] = Use(order, operation, self._of_leaf(found, tensor, axes))
        return output

    def _of_leaf(
        self, found: tuple[str, list[tuple[int, int]]], view: torch.Tensor, axes: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Return the uses of a leaf's axes, from those of a view's."""
        by_axis = dict(zip(_axes(view), axes, strict=False)) if len(axes) == view.ndim else {}
        return tuple(by_axis.get(axis, "") if axis[1] > 1 else "" for axis in found[1])

    def _copied(
        self, found: tuple[str, list[tuple[int, int]]], old: torch.Tensor, new: torch.Tensor
    ) -> list[tuple[int, int]]:
        """Return the leaf's axes in the memory of a copy of a view."""
        moved = dict(zip(_axes(old), _axes(new), strict=True))
        return [moved.get(axis, (-1, -1)) for axis in found[1]]


def _use(
    name: str, args: tuple, place: int, keyword: str, tensor: torch.Tensor
) -> tuple[str, tuple[str, ...]]:
    """Return the operation that a function is to one of its arguments, and what its axes are."""
    windows = tuple(f"w{number}" for number in range(tensor.ndim - 2))
    is_bias = keyword == "bias" or (tensor.ndim == 1 and place == 2 and keyword != "weight")
    if name.startswith("conv") or name == "linear":
        outer = ("i", "o") if "transpose" in name else ("o", "i")
        return ("term", ("o",)) if is_bias else ("product", (*outer, *windows))
    if name in ("matmul", "mm", "bmm", "__matmul__", "__rmatmul__", "addmm", "baddbmm"):
        first = int(name in ("addmm", "baddbmm"))
        if place < first:
            return "term", ()
        front, is_left = ("",) * (tensor.ndim - 2), (place == first) != (name == "__rmatmul__")
        return "product", (*front, "o", "i") if is_left else (*front, "i", "o")
    if name == "einsum":
        return "product", einsum_axes(str(args[0]), place - 1)
    if name in ("embedding", "__getitem__", "index_select", "gather"):
        axes = _looked_up(name, args, tensor.ndim)
        return "table", tuple("i" if x in axes else "o" for x in range(tensor.ndim))
    if name.endswith("_norm") or name in _FACTORS:
        return "term" if is_bias or (name.endswith("_norm") and place == 3) else "factor", ()
    return "term" if name in _TERMS else "other", ()


def _looked_up(name: str, args: tuple, num_axes: int) -> set[int]:
    """Return the axes of a table that are indexed."""
    if name == "__getitem__" and isinstance(args[1], tuple) and None not in map(_kind, args[1]):
        return {place for place, x in enumerate(args[1]) if not isinstance(x, slice)}
    if name in ("index_select", "gather") and len(args) > 1 and isinstance(args[1], int):
        return {args[1] % num_axes}
    return {0}


def _kind(index: object) -> type | None:
    """Return the type of an index; None for one that stands for any number of axes."""
    return None if index is None or index is Ellipsis else type(index)


def _memory(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse or wrapped tensors
        return id(tensor)


def _axes(tensor: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.stride(), tensor.shape, strict=True))


def _flat(values: object) -> Iterator[object]:
    """Yield arguments, and those in a list of them."""
    for value in values if isinstance(values, tuple) else ():
        yield from value if isinstance(value, tuple | list) else (value,)


def _tensors(values: tuple) -> Iterator[torch.Tensor]:
    return (x for x in _flat(values) if isinstance(x, torch.Tensor))
