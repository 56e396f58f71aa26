"""Other ways to do an operation: what people mix up, by the operation's name.

Each alternative is tried on the guilty module alone. In float64 the right one leaves nothing but
rounding, and a wrong one leaves 1e-5 or more, so what matches is the cause.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from parity.check.causes.replay import Done
from parity.frameworks.capture import leaves_of

Instead = Callable[..., Any]

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
_ACTIVATING = {"gelu", "relu", "silu", "tanh", "sigmoid", "hardswish", "leaky_relu", "elu", "mish"}
_COMPARISONS = {"lt": torch.le, "le": torch.lt, "gt": torch.ge, "ge": torch.gt}
_OTHERS = {"and", "or", "size", "dim", "numel", "stride"}
_INTEGRAL = {"arange", "add", "sub", "cumsum", "radd", "rsub", "where"}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def alternatives(done: Done, sizes: Collection[int]) -> Iterator[tuple[str, Instead]]:
    """Other ways to do one operation, each in words and as what to call in its place.

    Args:
        done: the operation.
        sizes: of axes, which scales are made of.
    """
    operation, args, kwargs, full = done.operation, done.args, done.kwargs, done.name
    if full in _OTHERS:
        return
    if full in _INTEGRAL and _is_integral(done.result):
        for shift in (1, -1):
            yield (
                f"{'numbers' if full == 'arange' else 'the result'} {shift:+d}",
                lambda *a, s=shift, **k: operation(*a, **k) + s,
            )
        if full == "add" and all(isinstance(x, torch.Tensor) for x in args[:2]):
            yield "x in place of x + y", lambda x, y, **k: x
    elif full in ("argmax", "argmin"):
        other = {"argmax": torch.argmin, "argmin": torch.argmax}[full]
        yield f"{other.__name__} in place of {full}", lambda *a, **k: other(*a, **k)
    elif full in _ACTIVATING:
        yield from _activations()
    elif "norm" in full:
        yield from _norms(operation, full, args, kwargs)
    elif full in ("var", "std", "var_mean"):
        flipped = 0 if kwargs.get("unbiased", kwargs.get("correction", 1)) else 1
        words = "an unbiased variance" if flipped else "a biased variance"
        kept = {k: v for k, v in kwargs.items() if k not in ("unbiased", "correction")}
        yield words, lambda *a, **k: operation(*_without_flags(a), **kept, correction=flipped)
    elif full == "linear":
        yield from _linear(args, kwargs)
    elif full in ("conv1d", "conv2d", "conv3d"):
        yield from _convolution(operation, *args, **kwargs)
    elif full in ("softmax", "log_softmax"):
        yield from _softmax(operation, args, kwargs, sizes)
    elif full == "scaled_dot_product_attention":
        yield from _fused_attention(operation, args, kwargs, sizes)
    elif full == "multi_head_attention_forward":
        yield from _inside_attention(operation, args, sizes)
    elif full in _COMPARISONS:
        other = _COMPARISONS[full]
        yield f"{other.__name__} in place of {full}", lambda *a, **k: other(*a[:2])
        yield f"all true in place of {full}", lambda *a, **k: torch.ones_like(done.result)
    elif full in ("eq", "ne"):
        yield f"all true in place of {full}", lambda *a, **k: torch.ones_like(done.result)
    elif full in ("tril", "triu"):
        diagonal = kwargs.get("diagonal", args[1] if len(args) > 1 else 0)
        for shift in (-1, 1):
            yield (
                f"diagonal={diagonal + shift} in {full}, not {diagonal}",
                lambda *a, shift=shift, **k: operation(a[0], diagonal=diagonal + shift),
            )
    elif full == "embedding":
        yield from _embedding(operation, args)
    elif full in ("masked_fill", "where"):
        yield from _masked(operation, full, args)
    elif full in ("chunk", "split", "unbind", "tensor_split"):
        yield from _orders(operation, args, kwargs)
    elif full == "flatten":
        yield from _channels_last(done)
    elif full in ("view", "reshape", "unflatten"):
        yield from _interleaved(done)
        yield from _channels_last(done)
    elif full == "repeat_interleave":
        yield (
            "repeats tiled, not next to each other",
            lambda x, n, dim=None, **k: torch.cat([x] * n, dim=dim if dim is not None else 0),
        )
    elif full == "cat":
        yield "parts in reverse order", lambda parts, *a, **k: operation(parts[::-1], *a, **k)
    elif full == "neg":
        yield "no change of sign", lambda x, *a, **k: x
    elif full in ("roll", "flip"):
        yield f"no {full}", lambda x, *a, **k: x
    elif full == "mean":
        yield "a sum in place of the mean", lambda *a, **k: torch.sum(*a, **k)
    elif full == "sum":
        yield "a mean in place of the sum", lambda *a, **k: torch.mean(*a, **k)
    elif full == "cross_entropy":
        yield from _cross_entropy(operation, kwargs)
    elif full == "getitem":
        yield from _slices(operation, args)
    elif full in ("to", "float", "half", "bfloat16", "type"):
        if _is_narrower(args[0], done.result):
            yield f"no cast to {done.result.dtype}".replace("torch.", ""), lambda x, *a, **k: x
    elif any(word in full for word in ("mul", "div", "add", "sub")):
        yield from _arithmetic(operation, full, args, sizes)


def _activations() -> Iterator[tuple[str, Instead]]:
    for words, function in ACTIVATIONS.items():
        yield words, lambda x, *a, f=function, **k: f(x)


def _norms(
    operation: Callable, name: str, args: tuple, kwargs: dict
) -> Iterator[tuple[str, Instead]]:
    # torch's own calls give epsilon by name, or last among the arguments.
    place = next((i for i, x in reversed(list(enumerate(args))) if isinstance(x, float)), None)
    now = kwargs.get("eps", args[place] if place is not None else None)
    for epsilon in _EPSILONS:
        if epsilon != now and "eps" in kwargs:
            yield f"eps={epsilon:g}", lambda *a, e=epsilon, **k: operation(*a, **k | {"eps": e})
        elif epsilon != now and place is not None:
            yield (
                f"eps={epsilon:g}",
                lambda *a, e=epsilon, **k: operation(*a[:place], e, *a[place + 1 :], **k),
            )
    yield "no norm", lambda x, *a, **k: x
    if name == "layer_norm":
        weight, bias = kwargs.get("weight"), kwargs.get("bias")
        if weight is not None:
            yield "no scale", lambda *a, **k: operation(*a, **k | {"weight": None})
            yield "a scale of 1 + w", lambda *a, **k: operation(*a, **k | {"weight": 1 + weight})
        if bias is not None:
            yield "no bias", lambda *a, **k: operation(*a, **k | {"bias": None})
        yield "an unbiased variance", _by_hand(unbiased=True, centred=True)
        yield "no mean subtracted", _by_hand(unbiased=False, centred=False)
        yield "eps added to the deviation", _by_hand(unbiased=False, centred=True, outside=True)


def _by_hand(unbiased: bool, centred: bool, outside: bool = False) -> Instead:
    def norm(x, shape, weight=None, bias=None, eps=1e-5):
        axes = tuple(range(-len(shape), 0))
        middle = x - x.mean(axes, keepdim=True) if centred else x
        count = math.prod(shape) - unbiased
        variance = middle.square().sum(axes, keepdim=True) / count
        y = middle / (variance.sqrt() + eps) if outside else middle / (variance + eps).sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return norm


def _linear(args: tuple, kwargs: dict) -> Iterator[tuple[str, Instead]]:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if weight.shape[0] == weight.shape[1]:
        yield "the weight transposed", lambda x, *a, **k: functional.linear(x, weight.T, bias)
    if bias is not None:
        yield "no bias", lambda x, *a, **k: functional.linear(x, weight)
        yield "the bias added twice", lambda x, *a, **k: functional.linear(x, weight, 2 * bias)


def _convolution(
    operation: Callable, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1
) -> Iterator[tuple[str, Instead]]:
    """torch pads both ends alike; "SAME" in jax pads what the stride needs, more at the end."""
    space, window = x.shape[2:], weight.shape[2:]
    strides, dilations = (
        (value,) * len(space) if isinstance(value, int) else tuple(value)
        for value in (stride, dilation)
    )
    ends = []
    for size, taps, step, gap in zip(space, window, strides, dilations, strict=True):
        total = max((-(-size // step) - 1) * step + (taps - 1) * gap + 1 - size, 0)
        ends = [total // 2, total - total // 2, *ends]
    paddings = {
        "SAME as jax pads": ends,
        "no padding": [0] * len(ends),
        "padding of half the window": [n // 2 for n in reversed(window) for _ in range(2)],
    }
    for words, pads in paddings.items():
        yield (
            words,
            lambda x, *a, pads=pads, **k: operation(
                functional.pad(x, pads), weight, bias, stride, 0, dilation, groups
            ),
        )
    turned = weight.flip(tuple(range(2, weight.ndim)))
    rest = bias, stride, padding, dilation, groups
    yield "the window back to front", lambda x, *a, **k: operation(x, turned, *rest)
    if bias is not None:
        yield "no bias", lambda x, *a, **k: operation(x, weight, None, *rest[1:])


def _softmax(
    operation: Callable, args: tuple, kwargs: dict, sizes: Collection[int]
) -> Iterator[tuple[str, Instead]]:
    axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    for other in range(-1, -args[0].ndim - 1, -1):
        if other not in (axis, axis - args[0].ndim):
            yield f"softmax over axis {other}", lambda x, *a, d=other, **k: operation(x, dim=d)
    yield (
        "softmax in float32",
        lambda x, *a, **k: operation(x.float(), dim=axis).to(x.dtype),
    )
    yield from (
        (words, lambda x, *a, s=s, **k: operation(x * s, dim=axis))
        for words, s in _scales(sizes, 1.0)
    )


def _fused_attention(
    operation: Callable, args: tuple, kwargs: dict, sizes: Collection[int]
) -> Iterator[tuple[str, Instead]]:
    query = args[0]
    now = kwargs.get("scale") or query.shape[-1] ** -0.5
    for words, scale in _scales(sizes, now):
        yield words, lambda *a, s=scale, **k: operation(*a, **k | {"scale": s * now})
    flipped = not kwargs.get("is_causal", False)
    words = "a causal mask" if flipped else "no causal mask"
    yield words, lambda q, k, v, *a, **kw: operation(q, k, v, is_causal=flipped)
    for words, order in (
        ("keys and values swapped", (0, 2, 1)),
        ("queries and keys swapped", (1, 0, 2)),
        ("queries and values swapped", (2, 1, 0)),
    ):
        yield words, lambda *a, o=order, **k: operation(*(a[place] for place in o), *a[3:], **k)


def _inside_attention(
    operation: Callable, args: tuple, sizes: Collection[int]
) -> Iterator[tuple[str, Instead]]:
    """torch.nn.MultiheadAttention's own function, by changing the attention that it calls."""
    width = args[0].shape[-1] // args[4]
    original = functional.scaled_dot_product_attention
    like = torch.empty((1, 1, 1, width))
    for words, change in _fused_attention(original, (like,) * 3, {}, {*sizes, width}):
        yield words, _patched(operation, change)


def _patched(operation: Callable, attention: Instead) -> Instead:
    def run(*args, **kwargs):
        original = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = attention
        try:
            return operation(*args, **kwargs | {"need_weights": False})
        finally:
            functional.scaled_dot_product_attention = original

    return run


def _embedding(operation: Callable, args: tuple) -> Iterator[tuple[str, Instead]]:
    rows = args[1].shape[0]
    for shift in (1, -1, 2):
        yield (
            f"ids shifted by {shift:+d}",
            lambda ids, *a, s=shift, **k: operation((ids + s).clamp(0, rows - 1), *a, **k),
        )
    yield "all ids 0", lambda ids, *a, **k: operation(ids * 0, *a, **k)
    scale = args[1].shape[-1] ** 0.5
    yield f"times sqrt({args[1].shape[-1]})", lambda *a, **k: operation(*a, **k) * scale


def _masked(operation: Callable, name: str, args: tuple) -> Iterator[tuple[str, Instead]]:
    if len(args) != 3 or not isinstance(args[0 if name == "where" else 1], torch.Tensor):
        return

    def masked(change: Callable[[torch.Tensor], torch.Tensor]) -> Instead:
        if name == "where":
            return lambda mask, *a, **k: operation(change(mask), *a, **k)
        return lambda x, mask, *a, **k: operation(x, change(mask), *a, **k)

    keeps = name == "where"
    yield "the mask inverted", masked(lambda mask: ~mask)
    yield "no mask", masked(lambda mask: torch.full_like(mask, keeps))
    mask = args[0 if name == "where" else 1]
    if mask.ndim and mask.shape[-1] > 1:
        for shift in (1, -1):
            yield (
                f"the mask shifted by {shift:+d}",
                masked(lambda mask, s=shift: _shifted(mask, s)),
            )
    # Against a number that is minus infinity for all purposes: what leaks through a small one.
    for value in (0.0, -1.0, -math.e, -10.0, -1e4, -1e9):
        if name == "masked_fill":
            yield f"{value:g} behind the mask", lambda x, m, *a, v=value: operation(x, m, v)
        elif isinstance(args[2], float | int) and not isinstance(args[2], bool):
            yield f"{value:g} behind the mask", lambda m, x, *a, v=value: operation(m, x, v)


def _shifted(mask: torch.Tensor, by: int) -> torch.Tensor:
    """The mask moved along its last axis; what comes in is what stood at the edge."""
    edge = mask[..., :1] if by > 0 else mask[..., -1:]
    return torch.cat([edge, mask[..., :-1]] if by > 0 else [mask[..., 1:], edge], dim=-1)


def _orders(operation: Callable, args: tuple, kwargs: dict) -> Iterator[tuple[str, Instead]]:
    count = len(operation(*args, **kwargs))
    if 2 <= count <= 4:
        for order in itertools.permutations(range(count)):
            if order != tuple(range(count)):
                numbers = ", ".join(str(place + 1) for place in order)
                yield (
                    f"parts in the order {numbers}",
                    lambda *a, o=order, **k: [operation(*a, **k)[place] for place in o],
                )


def _interleaved(done: Done) -> Iterator[tuple[str, Instead]]:
    """Where one axis becomes two, the numbers of the second may lie next to those of the first."""
    x, made = done.args[0], done.result
    for axis in range(x.ndim):
        if made.ndim == x.ndim + 1 and made.shape[:axis] == x.shape[:axis]:
            first, second = made.shape[axis : axis + 2]
            if made.shape[axis + 2 :] == x.shape[axis + 1 :] and first > 1 and second > 1:

                def other(x, *a, axis=axis, first=first, second=second, **k):
                    return x.unflatten(axis, (second, first)).swapaxes(axis, axis + 1)

                yield f"{first} groups interleaved, not one behind the other", other


def _channels_last(done: Done) -> Iterator[tuple[str, Instead]]:
    """Channels and positions in one axis, in torch's order of them or in flax's."""
    x, made = done.args[0], done.result
    if x.ndim >= 3 and made.ndim == 2 and made.shape[0] == x.shape[0]:
        yield (
            "channels last in the flat axis",
            lambda x, *a, **k: x.movedim(1, -1).reshape(made.shape),
        )


def _cross_entropy(operation: Callable, kwargs: dict) -> Iterator[tuple[str, Instead]]:
    for reduction in ("mean", "sum"):
        if kwargs.get("reduction", "mean") != reduction:
            yield (
                f"reduction={reduction}",
                lambda *a, r=reduction, **k: operation(*a, **k | {"reduction": r}),
            )
    if kwargs.get("label_smoothing"):
        yield "no smoothing", lambda *a, **k: operation(*a, **k | {"label_smoothing": 0.0})


def _slices(operation: Callable, args: tuple) -> Iterator[tuple[str, Instead]]:
    """A slice that leaves out the first may leave out the last, and the other way round."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    for place, part in enumerate(index):
        if isinstance(part, slice) and part in (slice(1, None), slice(None, -1)):
            other = slice(None, -1) if part == slice(1, None) else slice(1, None)
            yield (
                f"[{_spelt(other)}] in place of [{_spelt(part)}]",
                lambda x, i, o=(*index[:place], other, *index[place + 1 :]): operation(x, o),
            )


def _spelt(part: slice) -> str:
    return f"{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}"


def _arithmetic(
    operation: Callable, name: str, args: tuple, sizes: Collection[int]
) -> Iterator[tuple[str, Instead]]:
    tensors = [x for x in args[:2] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    number = next((x for x in args[:2] if isinstance(x, float)), None)
    if number is not None and tensors:
        if name.endswith(("mul", "div")):
            factor = number if "mul" in name else 1 / number
            for words, scale in _scales(sizes, factor):
                yield words, lambda *a, s=scale, **k: operation(*a, **k) * s
        if name.endswith("add") and 0 < number < 1e-2:
            for epsilon in _EPSILONS:
                if epsilon != number:
                    yield f"eps={epsilon:g}", lambda *a, e=epsilon, **k: _tensor_of(a) + e
    elif len(tensors) == 2:
        sign = next(sign for word, sign in _SIGNS.items() if word in name)
        yield f"x in place of x {sign} y", lambda x, y, **k: x
        yield f"y in place of x {sign} y", lambda x, y, **k: y
        if sign == "+":
            yield "x - y in place of x + y", lambda x, y, **k: x - y
        if sign == "-":
            yield "x + y in place of x - y", lambda x, y, **k: x + y


def substitutes(done: Done, others: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Instead]]:
    """A sum of another tensor that was at hand: a residual around the wrong place."""
    if not done.name.endswith(("add", "sub")):
        return
    for place, side in enumerate(done.args[:2]):
        for name, tensor in others.items():
            if isinstance(side, torch.Tensor) and side.shape == tensor.shape and side is not tensor:

                def other(*a, place=place, tensor=tensor, **k):
                    return done.operation(*a[:place], tensor, *a[place + 1 :], **k)

                yield f"{name} on the {('left', 'right')[place]} of its sum", other


def common_sizes(operations: Iterable[Done]) -> list[int]:
    """Sizes of axes that a scale may be made of, the most frequent first."""
    found = Counter(
        size
        for done in operations
        for x in leaves_of(done.args)
        if isinstance(x, torch.Tensor)
        for size in x.shape
        if size > 1
    )
    return [size for size, _ in found.most_common(_SIZES)]


def _tensor_of(args: tuple) -> torch.Tensor:
    return next(x for x in args if isinstance(x, torch.Tensor))


def _is_integral(result: Any) -> bool:
    return isinstance(result, torch.Tensor) and result.dtype in (torch.int32, torch.int64)


def _is_narrower(x: Any, result: Any) -> bool:
    return (
        isinstance(x, torch.Tensor)
        and isinstance(result, torch.Tensor)
        and x.is_floating_point()
        and result.is_floating_point()
        and torch.finfo(result.dtype).bits < torch.finfo(x.dtype).bits
    )


def _scales(sizes: Collection[int], now: float) -> Iterator[tuple[str, float]]:
    """Factors that bring a scale of `now` to another usual one, in words."""
    usual = {"a scale of 1": 1.0}
    for power in (-0.5, -1.0, 0.5):
        usual |= {f"a scale of {size}**{power:g}": size**power for size in sizes}
    usual |= {f"a scale of {a * b}**-0.5": (a * b) ** -0.5 for a in sizes for b in sizes if a <= b}
    for words, scale in usual.items():
        if not math.isclose(scale, now, rel_tol=1e-9):
            yield words, scale / now


def _without_flags(args: tuple) -> tuple:
    return tuple(x for x in args if not isinstance(x, bool))
