"""Alternatives to an operation: what people mix up, by the operation's name.

Each alternative is tried on the divergent module alone. In float64 the right one leaves nothing but
rounding, and a wrong one leaves 1e-5 or more, so what matches is the cause.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch.nn import functional

from parity.check.causes.replay import Done, Operation
from parity.frameworks.capture import leaves_of

Found = Iterator[tuple[str, Operation]]  # descriptions, and what to call instead

_SIZES = 8
_EPSILONS = 1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-7, 0.0, torch.finfo(torch.float32).eps
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu with tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "exact gelu": functional.gelu,
    "gelu by x * sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "no activation": lambda x: x,
}
_COMPARISONS = {"lt": torch.le, "le": torch.lt, "gt": torch.ge, "ge": torch.gt}
_INTEGRAL = {"arange", "add", "sub", "cumsum", "radd", "rsub", "where"}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def alternatives(done: Done, sizes: Collection[int]) -> Found:
    """Yield alternatives to one operation; scales are made of the sizes of axes."""
    if done.name in _INTEGRAL and _is_integral(done.result):
        yield from _integers(done)
    elif done.name in _SCALED:
        yield from _SCALED[done.name](done, sizes)
    elif done.name in _PLAIN:
        yield from _PLAIN[done.name](done)
    elif done.name in _FIXED:
        yield _FIXED[done.name]
    elif "norm" in done.name:
        yield from _norms(done)
    elif any(word in done.name for word in _SIGNS):
        yield from _arithmetic(done, sizes)


def alternative(done: Done, sizes: Collection[int], number: int) -> Operation | None:
    """Return the alternative of that number, if there are so many."""
    found = itertools.islice(alternatives(done, sizes), number, None)
    return next(found, (None, None))[1]


def left_out(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Return the first argument: the operation left out."""
    return x


def _then(operation: Operation, change: Operation) -> Operation:
    """Change the result of an operation."""
    return lambda *args, **kwargs: change(operation(*args, **kwargs))


def _with(operation: Operation, **changes: object) -> Operation:
    """Call an operation with other keyword arguments."""
    return lambda *args, **kwargs: operation(*args, **kwargs | changes)


def on_argument(place: int, operation: Operation, change: Operation) -> Operation:
    """Change one argument of an operation."""
    return lambda *a, **k: operation(*a[:place], change(a[place]), *a[place + 1 :], **k)


def _a_tensor(*args: object, **kwargs: object) -> object:
    """Return the first argument that is a tensor."""
    return next(x for x in args if isinstance(x, torch.Tensor))


def _integers(done: Done) -> Found:
    words = "numbers" if done.name == "arange" else "the result"
    for shift in (1, -1):
        yield f"{words} {shift:+d}", _then(done.operation, lambda x, s=shift: x + s)
    if done.name == "add" and all(isinstance(x, torch.Tensor) for x in done.args[:2]):
        yield "x in place of x + y", left_out


def _activations(done: Done) -> Found:
    for words, function in ACTIVATIONS.items():
        yield words, lambda x, *a, f=function, **k: f(x)


def _softplus(done: Done) -> Found:
    """Yield other slopes, and the function without torch's threshold, beyond which it is linear."""
    now = done.kwargs.get("beta", done.args[1] if len(done.args) > 1 else 1)
    for beta in dict.fromkeys((now, 1, 10)):
        words = "no threshold, as jax has none" if beta == now else f"beta={beta:g}"
        yield f"{words} in softplus", lambda x, *a, b=beta, **k: torch.logaddexp(x * b, 0 * x) / b


def _leaky(done: Done) -> Found:
    for slope in (0.01, 0.2, 0.1, 0.3):
        yield f"slope={slope:g}", lambda x, *a, s=slope, **k: functional.leaky_relu(x, s)
    yield from _activations(done)


def _pools(done: Done) -> Found:
    """Yield an average that counts other places, and a window that may pass the end."""
    if done.name.startswith("avg"):
        yield "count_include_pad the other way", _toggled(done, 5, "count_include_pad", True)
        yield "ceil_mode the other way", _toggled(done, 4, "ceil_mode", False)
    else:
        yield "ceil_mode the other way", _toggled(done, 5, "ceil_mode", False)


def _toggled(done: Done, place: int, name: str, default: bool) -> Operation:
    """Turn a flag of an operation over, which is given in its place or by name."""
    if len(done.args) > place:
        return on_argument(place, done.operation, lambda flag: not flag)
    return _with(done.operation, **{name: not done.kwargs.get(name, default)})


def _resized(done: Done) -> Found:
    if done.kwargs.get("mode") in ("linear", "bilinear", "bicubic", "trilinear"):
        now = bool(done.kwargs.get("align_corners"))
        yield f"align_corners={not now}", _with(done.operation, align_corners=not now)
        yield "antialias the other way", _toggled(done, 7, "antialias", False)
    elif done.kwargs.get("mode") == "nearest":
        yield "the centres of pixels", _with(done.operation, mode="nearest-exact")


def _variances(done: Done) -> Found:
    correction = 0 if done.kwargs.get("unbiased", done.kwargs.get("correction", 1)) else 1
    kept = {k: v for k, v in done.kwargs.items() if k not in ("unbiased", "correction")}

    def flipped(*args: object, **kwargs: object) -> object:
        without_flags = (x for x in args if not isinstance(x, bool))
        return done.operation(*without_flags, **kept, correction=correction)

    yield "an unbiased variance" if correction else "a biased variance", flipped


def _comparisons(done: Done) -> Found:
    if other := _COMPARISONS.get(done.name):
        yield f"{other.__name__} in place of {done.name}", lambda *a, **k: other(*a[:2])
    yield f"all true in place of {done.name}", lambda *a, **k: torch.ones_like(done.result)


def _triangles(done: Done) -> Found:
    diagonal = done.kwargs.get("diagonal", done.args[1] if len(done.args) > 1 else 0)
    for other in (diagonal - 1, diagonal + 1):
        words = f"diagonal={other} in {done.name}, not {diagonal}"
        yield words, lambda x, *a, d=other, **k: done.operation(x, diagonal=d)


def _casts(done: Done) -> Found:
    floats = [
        torch.finfo(x.dtype)
        for x in (done.args[0], done.result)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    if len(floats) == 2 and floats[1].bits < floats[0].bits:
        yield f"no cast to {floats[1].dtype}", left_out


def _norms(done: Done) -> Found:
    operation, args, kwargs = done.operation, done.args, done.kwargs
    if done.name == "weight_norm":
        yield from _weight_norms(done)
        return
    # torch's own calls give epsilon by name, or last among the arguments.
    place = next((i for i, x in reversed(list(enumerate(args))) if isinstance(x, float)), None)
    now = kwargs.get("eps", args[place] if place is not None else None)
    for epsilon in _EPSILONS:
        if epsilon != now and "eps" in kwargs:
            yield f"eps={epsilon:g}", _with(operation, eps=epsilon)
        elif epsilon != now and place is not None:
            yield f"eps={epsilon:g}", on_argument(place, operation, lambda _, e=epsilon: e)
    yield "no norm", left_out
    if done.name == "layer_norm":
        if (weight := kwargs.get("weight")) is not None:
            yield "no scale", _with(operation, weight=None)
            yield "a scale of 1 + w", _with(operation, weight=1 + weight)
        if kwargs.get("bias") is not None:
            yield "no bias", _with(operation, bias=None)
        yield "an unbiased variance", _layer_norm(unbiased=True, centred=True)
        yield "no mean subtracted", _layer_norm(unbiased=False, centred=False)
        yield "eps added to the deviation", _layer_norm(unbiased=False, centred=True, outside=True)


def _weight_norms(done: Done) -> Found:
    """Yield weights normed over other axes: torch norms over all but one."""
    v, _, *rest = done.args
    axis = rest[0] if rest else 0
    over = [place for place in range(v.ndim) if place != axis % v.ndim]
    for count in range(1, v.ndim + 1):
        for axes in itertools.combinations(range(v.ndim), count):
            if list(axes) != over:
                words = ", ".join(map(str, axes))

                def normed(v, g, *a, axes=axes, **k):
                    return g * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)

                yield f"the norm over {'axes' if count > 1 else 'axis'} {words} alone", normed
    yield "no norm of the weight", left_out
    yield "no scale of the weight", lambda v, g, *a, **k: done.operation(v, g * 0 + 1, *a, **k)


def _layer_norm(unbiased: bool, centred: bool, outside: bool = False) -> Operation:
    """Make a layer norm by hand; `outside` adds epsilon to the deviation, not to the variance."""

    def norm(x, shape, weight=None, bias=None, eps=1e-5):
        axes = tuple(range(-len(shape), 0))
        middle = x - x.mean(axes, keepdim=True) if centred else x
        count = math.prod(shape) - unbiased
        variance = middle.square().sum(axes, keepdim=True) / count
        y = middle / (variance.sqrt() + eps) if outside else middle / (variance + eps).sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return norm


def _linear(done: Done) -> Found:
    weight = done.args[1] if len(done.args) > 1 else done.kwargs["weight"]
    bias = done.args[2] if len(done.args) > 2 else done.kwargs.get("bias")
    if weight.shape[0] == weight.shape[1]:
        yield "the weight transposed", lambda x, *a, **k: functional.linear(x, weight.T, bias)
    if bias is not None:
        yield "no bias", lambda x, *a, **k: functional.linear(x, weight)
        yield "the bias added twice", lambda x, *a, **k: functional.linear(x, weight, 2 * bias)


def _convolutions(done: Done) -> Found:
    """Yield paddings: torch pads both ends alike, "SAME" in jax pads more at the end if uneven."""

    def arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        return input, weight, bias, stride, padding, dilation, groups

    x, weight, bias, *rest = arguments(*done.args, **done.kwargs)
    space, window = x.shape[2:], weight.shape[2:]
    strides, dilations = (
        (value,) * len(space) if isinstance(value, int) else tuple(value)
        for value in (rest[0], rest[2])
    )
    ends: list[int] = []
    for size, taps, step, gap in zip(space, window, strides, dilations, strict=True):
        total = max((-(-size // step) - 1) * step + (taps - 1) * gap + 1 - size, 0)
        ends = [total // 2, total - total // 2, *ends]
    unpadded = strides, 0, dilations, rest[3]
    for words, pads in (
        ("SAME as jax pads", ends),
        ("no padding", [0] * len(ends)),
        ("padding of half the window", [n // 2 for n in reversed(window) for _ in range(2)]),
    ):

        def padded(x: torch.Tensor, *a: object, pads: list[int] = pads, **k: object) -> object:
            return done.operation(functional.pad(x, pads), weight, bias, *unpadded)

        yield words, padded
    # Other dilations, with as much padding less or more, in front alone or on both sides.
    for gap in (1, 2, 4) if len(set(dilations)) == 1 else ():
        if gap == dilations[0]:
            continue
        more = [(n - 1) * (gap - dilations[0]) for n in reversed(window)]
        for one_sided in (True, False):
            pads = [x for n in more for x in ((n, 0) if one_sided else (n // 2, n - n // 2))]
            settings = strides, rest[1], (gap,) * len(space), rest[3]

            def dilated(
                x: torch.Tensor, *a: object, pads: list[int] = pads, own=settings, **k: object
            ) -> object:
                return done.operation(functional.pad(x, pads), weight, bias, *own)

            yield f"a dilation of {gap}", dilated
    flipped = weight.flip(tuple(range(2, weight.ndim)))
    yield "the window back to front", lambda x, *a, **k: done.operation(x, flipped, bias, *rest)
    if bias is not None:
        yield "no bias", lambda x, *a, **k: done.operation(x, weight, None, *rest)


def _softmax(done: Done, sizes: Collection[int]) -> Found:
    operation, ndim = done.operation, done.args[0].ndim
    axis = done.kwargs.get("dim", done.args[1] if len(done.args) > 1 else -1)
    other = torch.log_softmax if done.name == "softmax" else torch.softmax
    yield f"{other.__name__} in place of {done.name}", lambda x, *a, **k: other(x, dim=axis)
    yield f"no {done.name}", left_out
    for turned in range(-1, -ndim - 1, -1):
        if turned not in (axis, axis - ndim):
            yield f"softmax over axis {turned}", lambda x, *a, d=turned, **k: operation(x, dim=d)
    yield "softmax in float32", lambda x, *a, **k: operation(x.float(), dim=axis).to(x.dtype)
    for words, scale in _scales(sizes, 1.0):
        yield words, lambda x, *a, s=scale, **k: operation(x * s, dim=axis)


def _fused_attention(done: Done, sizes: Collection[int]) -> Found:
    operation, kwargs = done.operation, done.kwargs
    now = kwargs.get("scale") or done.args[0].shape[-1] ** -0.5
    for words, scale in _scales(sizes, now):
        yield words, _with(operation, scale=scale * now)
    causal = not kwargs.get("is_causal", False)
    words = "a causal mask" if causal else "no causal mask"
    yield words, lambda q, k, v, *a, **kw: operation(q, k, v, is_causal=causal)
    for words, order in (
        ("keys and values swapped", (0, 2, 1)),
        ("queries and keys swapped", (1, 0, 2)),
        ("queries and values swapped", (2, 1, 0)),
    ):
        yield words, lambda *a, o=order, **k: operation(*(a[place] for place in o), *a[3:], **k)


def _products(done: Done) -> Found:
    """Yield a product with square operands transposed."""
    for place, side in enumerate(done.args[:2]):
        if isinstance(side, torch.Tensor) and side.ndim >= 2 and side.shape[-1] == side.shape[-2]:
            words = f"the {('left', 'right')[place]} operand transposed"
            yield words, on_argument(place, done.operation, lambda x: x.mT)


def _inside_attention(done: Done, sizes: Collection[int]) -> Found:
    """Yield changes of the attention that torch.nn.MultiheadAttention's own function calls."""
    width = done.args[0].shape[-1] // done.args[4]
    original, like = functional.scaled_dot_product_attention, torch.empty((1, 1, 1, width))
    inner = Done(original, (like,) * 3, {}, "", None)
    for words, attention in _fused_attention(inner, {*sizes, width}):

        def patched(*args: object, attention: Operation = attention, **kwargs: object) -> object:
            functional.scaled_dot_product_attention = attention
            try:
                return done.operation(*args, **kwargs | {"need_weights": False})
            finally:
                functional.scaled_dot_product_attention = original

        yield words, patched


def _embedding(done: Done) -> Found:
    rows, width = done.args[1].shape
    for shift in (1, -1, 2):
        shifted = on_argument(0, done.operation, lambda ids, s=shift: (ids + s).clamp(0, rows - 1))
        yield f"ids shifted by {shift:+d}", shifted
    least = int(done.args[0].min()) if done.args[0].numel() else 0
    if least > 2:
        shifted = on_argument(0, done.operation, lambda ids, n=least: (ids - n).clamp(0))
        yield f"ids shifted by {-least:+d}", shifted
    yield "all ids 0", on_argument(0, done.operation, lambda ids: ids * 0)
    yield f"times sqrt({width})", _then(done.operation, lambda x: x * width**0.5)


def _masked(done: Done) -> Found:
    operation, args, keeps = done.operation, done.args, done.name == "where"
    place = 0 if keeps else 1
    if len(args) != 3 or not isinstance(mask := args[place], torch.Tensor):
        return
    yield "the mask inverted", on_argument(place, operation, lambda mask: ~mask)
    yield "no mask", on_argument(place, operation, lambda mask: torch.full_like(mask, keeps))
    if mask.ndim and mask.shape[-1] > 1:
        for shift in (1, -1):
            shifted = on_argument(place, operation, lambda mask, s=shift: _shifted(mask, s))
            yield f"the mask shifted by {shift:+d}", shifted
    # Against a number that is minus infinity for all purposes: what leaks through a small one.
    is_number = isinstance(args[2], float | int) and not isinstance(args[2], bool)
    for value in (0.0, -1.0, -math.e, -10.0, -1e4, -1e9) if is_number or not keeps else ():
        yield f"{value:g} behind the mask", on_argument(2, operation, lambda _, v=value: v)


def _shifted(mask: torch.Tensor, by: int) -> torch.Tensor:
    """Move a mask along its last axis; its edge is repeated."""
    edge = mask[..., :1] if by > 0 else mask[..., -1:]
    return torch.cat([edge, mask[..., :-1]] if by > 0 else [mask[..., 1:], edge], dim=-1)


def _orders(done: Done) -> Found:
    count = len(done.operation(*done.args, **done.kwargs))
    for order in itertools.permutations(range(count)) if 2 <= count <= 4 else ():
        if order != tuple(range(count)):
            numbers = ", ".join(str(place + 1) for place in order)
            reordered = _then(done.operation, lambda x, o=order: [x[place] for place in o])
            yield f"parts in the order {numbers}", reordered

    for place in range(count) if count == 2 else ():
        same = _then(done.operation, lambda x, p=place: [x[p], x[p]])
        yield f"part {place + 1} in place of both", same


def _joined(done: Done) -> Found:
    """Yield parts that are joined in other orders."""
    given = done.args[0] if done.args else ()
    count = len(given) if isinstance(given, tuple | list) else 0
    orders = itertools.permutations(range(count)) if count <= 4 else (tuple(range(count))[::-1],)
    for order in sorted(orders, reverse=True):
        if order != tuple(range(count)):
            numbers = ", ".join(str(place + 1) for place in order)
            back = order == tuple(range(count))[::-1]
            words = "parts in reverse order" if back else f"parts in the order {numbers}"
            reordered = on_argument(0, done.operation, lambda x, o=order: [x[place] for place in o])
            yield words, reordered


def _clamps(done: Done) -> Found:
    """Yield bounds one less or more, and none."""
    names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(done.name, ("min", "max"))
    now = dict(zip(names, done.args[1:], strict=False)) | done.kwargs
    for name, bound in now.items():
        if not isinstance(bound, int | float):
            continue
        for step in (-1, 1) if isinstance(bound, int) else ():
            changed = now | {name: bound + step}
            words = f"{name}={bound + step} in {done.name}, not {bound}"
            yield words, lambda x, *a, c=changed, **k: torch.clamp(x, **c)
        kept = {key: value for key, value in now.items() if key != name}
        yield (
            f"no {name} in {done.name}",
            lambda x, *a, c=kept, **k: torch.clamp(x, **c) if c else x,
        )


def _bags(done: Done) -> Found:
    """Yield other ways to reduce a bag."""
    now = done.kwargs.get("mode", done.args[5] if len(done.args) > 5 else "mean")
    for mode in ("sum", "mean", "max"):
        if mode != now:
            changed = (
                on_argument(5, done.operation, lambda _, m=mode: m)
                if len(done.args) > 5
                else _with(done.operation, mode=mode)
            )
            yield f"mode={mode} in {done.name}", changed


def _reductions(done: Done) -> Found:
    """Yield other reductions over the same axes, and one place of an axis alone."""
    x, kwargs = done.args[0], done.kwargs
    axis = kwargs.get("dim", kwargs.get("axis", done.args[1] if len(done.args) > 1 else None))
    if not isinstance(x, torch.Tensor) or isinstance(axis, bool | torch.Tensor):
        return
    axes = tuple(range(x.ndim)) if axis is None else axis
    kept = bool(kwargs.get("keepdim", done.args[2] if len(done.args) > 2 else False))
    if isinstance(done.result, torch.Tensor) and x.is_floating_point():
        words = {"sum": "a sum", "mean": "a mean", "amax": "the largest"}
        own = "the largest" if done.name == "max" else f"the {done.name}"
        for name, other in (("sum", torch.sum), ("mean", torch.mean), ("amax", torch.amax)):
            if name != done.name:
                yield (
                    f"{words[name]} in place of {own}",
                    lambda x, *a, f=other, **k: f(x, dim=axes, keepdim=kept),
                )
        if isinstance(axis, int) and not kept:
            for name, place in (("first", 0), ("last", -1)):
                yield (
                    f"the {name} along axis {axis} in place of {own}",
                    lambda x, *a, p=place, **k: x.select(axis, p),
                )


def _reshapes(done: Done) -> Found:
    """Interleave an axis that becomes two; order a channel axis that becomes flat as flax does."""
    x, made = done.args[0], done.result
    for axis in range(x.ndim) if made.ndim == x.ndim + 1 else ():
        first, second = made.shape[axis : axis + 2]
        around = made.shape[:axis], made.shape[axis + 2 :]
        if around == (x.shape[:axis], x.shape[axis + 1 :]) and first > 1 and second > 1:

            def other(x, *a, axis=axis, sizes=(second, first), **k):
                return x.unflatten(axis, sizes).swapaxes(axis, axis + 1)

            yield f"{first} groups interleaved, not one behind the other", other
    if x.ndim >= 3 and made.ndim == 2 and made.shape[0] == x.shape[0]:
        flat = made.shape
        yield "channels last in the flat axis", lambda x, *a, **k: x.movedim(1, -1).reshape(flat)


def _cross_entropy(done: Done) -> Found:
    for reduction in ("mean", "sum"):
        if done.kwargs.get("reduction", "mean") != reduction:
            yield f"reduction={reduction}", _with(done.operation, reduction=reduction)
    if done.kwargs.get("label_smoothing"):
        yield "no smoothing", _with(done.operation, label_smoothing=0.0)


def _slices(done: Done) -> Found:
    """Take other places, or their mean; leave out the last where a slice leaves out the first."""
    index = done.args[1] if isinstance(done.args[1], tuple) else (done.args[1],)
    yield from _places(done, index)
    if any(isinstance(part, torch.Tensor) for part in index) and isinstance(
        done.args[0], torch.Tensor
    ):
        for axis in range(done.result.ndim):
            words = f"the places back to front along axis {axis}"
            yield words, _then(done.operation, lambda x, a=axis: x.flip(a))
    first, last = ("[1:]", slice(1, None)), ("[:-1]", slice(None, -1))
    for place, part in enumerate(index):
        for (now, given), (words, other) in ((first, last), (last, first)):
            if isinstance(part, slice) and part == given:
                changed = *index[:place], other, *index[place + 1 :]
                yield (
                    f"{words} in place of {now}",
                    on_argument(1, done.operation, lambda _, o=changed: o),
                )


def _places(done: Done, index: tuple[object, ...]) -> Found:
    """Yield other places along an axis than that of an index, and reductions over all of them."""
    x, made = done.args[0], done.result
    if not isinstance(x, torch.Tensor) or not isinstance(made, torch.Tensor):
        return
    # Several arrays of indices, of which one counts the rows, take one place of each row.
    taken = [i for i, part in enumerate(index) if isinstance(part, torch.Tensor | int)]
    arrays = [i for i in taken if isinstance(index[i], torch.Tensor)]
    if any(part is ... for part in index):
        return
    if len(taken) == 1 and not arrays:
        axis = taken[0]
    elif len(taken) == 2 and len(arrays) == 2 and taken == [0, 1] and x.ndim >= 2:
        axis = 1
    else:
        return
    if x.shape[axis] < 2 or not x.is_floating_point():
        return
    for words, instead in (
        ("the first", lambda x, *a, **k: x.select(axis, 0)),
        ("the last", lambda x, *a, **k: x.select(axis, x.shape[axis] - 1)),
        ("the mean", lambda x, *a, **k: x.mean(axis)),
        ("the largest", lambda x, *a, **k: x.amax(axis)),
        ("the sum", lambda x, *a, **k: x.sum(axis)),
    ):
        yield f"{words} along axis {axis} in place of one", _in_index(index, axis, instead)


def _in_index(index: tuple[object, ...], axis: int, instead: Operation) -> Operation:
    """Apply the slices of an index around the axis that another operation takes away."""
    around = tuple(
        slice(None) if place == axis or not isinstance(part, slice) else part
        for place, part in enumerate(index)
    )
    return lambda x, *a, **k: instead(x[around])


def _arithmetic(done: Done, sizes: Collection[int]) -> Found:
    operation, name, args = done.operation, done.name, done.args
    tensors = [x for x in args[:2] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    numbers = (x for x in args[:2] if isinstance(x, float | int) and not isinstance(x, bool))
    number = next(numbers, None)
    if number is not None and tensors:
        if name.endswith(("mul", "div")) and number:
            factor = number if "mul" in name else 1 / number
            for words, scale in _scales(sizes, factor):
                yield words, _then(operation, lambda x, s=scale: x * s)
        if name.endswith(("add", "sub")) and number:
            yield f"x in place of x {'+' if 'add' in name else '-'} {abs(number):g}", _a_tensor
        if name.endswith("add") and 0 < number < 1e-2:
            for epsilon in _EPSILONS:
                if epsilon != number:
                    place = 1 if isinstance(args[1], float) else 0
                    yield f"eps={epsilon:g}", on_argument(place, operation, lambda _, e=epsilon: e)
    elif len(tensors) == 2:
        sign = next(sign for word, sign in _SIGNS.items() if word in name)
        yield f"x in place of x {sign} y", left_out
        yield f"y in place of x {sign} y", lambda x, y, **k: y
        if sign == "+":
            yield "x - y in place of x + y", lambda x, y, **k: x - y
        if sign == "-":
            yield "x + y in place of x - y", lambda x, y, **k: x + y


def substitutes(done: Done, others: Mapping[str, torch.Tensor]) -> Found:
    """Yield sums with another tensor at hand, such as a residual around the wrong place."""
    if not done.name.endswith(("add", "sub")):
        return
    for place, side in enumerate(done.args[:2]):
        for name, tensor in others.items():
            if isinstance(side, torch.Tensor) and side.shape == tensor.shape and side is not tensor:
                words = f"{name} on the {('left', 'right')[place]} of its sum"
                yield words, on_argument(place, done.operation, lambda _, tensor=tensor: tensor)


def common_sizes(operations: Iterable[Done]) -> list[int]:
    """Return sizes of axes of which a scale may be made, the most frequent first."""
    arguments = (x for done in operations for x in leaves_of(done.args))
    shapes = (x.shape for x in arguments if isinstance(x, torch.Tensor))
    found = Counter(size for shape in shapes for size in shape if size > 1)
    return [size for size, _ in found.most_common(_SIZES)]


def _is_integral(result: object) -> bool:
    return isinstance(result, torch.Tensor) and result.dtype in (torch.int32, torch.int64)


def _scales(sizes: Collection[int], now: float) -> Iterator[tuple[str, float]]:
    """Yield factors that turn a scale of `now` into another usual one, with descriptions."""
    usual = {"a scale of 1": 1.0}
    for power in (-0.5, -1.0, 0.5):
        usual |= {f"a scale of {size}**{power:g}": size**power for size in sizes}
    usual |= {f"a scale of {a * b}**-0.5": (a * b) ** -0.5 for a in sizes for b in sizes if a <= b}
    for words, scale in usual.items():
        if not math.isclose(scale, now, rel_tol=1e-9):
            yield words, scale / now


# By operation: those whose alternatives need sizes, those that need the call, and fixed ones.
_SCALED: dict[str, Callable[[Done, Collection[int]], Found]] = {
    "softmax": _softmax,
    "log_softmax": _softmax,
    "scaled_dot_product_attention": _fused_attention,
    "multi_head_attention_forward": _inside_attention,
}
_PLAIN: dict[str, Callable[[Done], Found]] = {
    name: rule
    for names, rule in (
        ("gelu relu silu tanh sigmoid hardswish elu mish", _activations),
        ("softplus", _softplus),
        ("leaky_relu", _leaky),
        ("avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d", _pools),
        ("interpolate", _resized),
        ("var std var_mean", _variances),
        ("linear", _linear),
        ("conv1d conv2d conv3d", _convolutions),
        ("lt le gt ge eq ne", _comparisons),
        ("tril triu", _triangles),
        ("embedding", _embedding),
        ("masked_fill where", _masked),
        ("chunk split unbind tensor_split", _orders),
        ("cat concat concatenate stack", _joined),
        ("clamp clip clamp_min clamp_max", _clamps),
        ("embedding_bag", _bags),
        ("matmul bmm baddbmm", _products),
        ("mean sum amax amin max", _reductions),
        ("view reshape unflatten flatten", _reshapes),
        ("cross_entropy", _cross_entropy),
        ("getitem", _slices),
        ("to float half bfloat16 type", _casts),
    )
    for name in names.split()
}
_FIXED: dict[str, tuple[str, Operation]] = {
    "argmax": ("argmin in place of argmax", torch.argmin),
    "argmin": ("argmax in place of argmin", torch.argmax),
    "flip": ("no flip", left_out),
    "neg": ("no change of sign", left_out),
    "repeat_interleave": (
        "repeats tiled, not next to each other",
        lambda x, n, dim=None, **k: torch.cat([x] * n, dim=dim or 0),
    ),
    "roll": ("no roll", left_out),
}
