"""Lifted float64: a PyTorch program in which all that asks for a narrower float runs in float64.

Published models cast to float32 inside: norms, softmax, tables of angles. In float64 such a model
says little, for each cast rounds to 1e-7. Lifted, it computes what its code says without that
rounding, and the code itself stays as it is.

Two modes do it. One sits below autograd, where every operation passes with its final arguments, so
that casts of autocast, of scripts and of torch itself are lifted too, and gradients with them. The
other sits above, where arguments are as the user wrote them: a constant that is still text, and a
check of types that comes before the first.
"""

import contextlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TypeGuard, TypeVar, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from parity.frameworks.capture import leaves_of
from parity.frameworks.purity import Purity
from parity.frameworks.rounding import half_units, unrounded
from parity.frameworks.torch.leaves import numpy_view

# The wide type of each narrow one.
_WIDE = {x: torch.float64 for x in (torch.float32, torch.float16, torch.bfloat16)}
_WIDE |= {x: torch.float64 for x in vars(torch).values() if str(x).startswith("torch.float8")}
_WIDE |= {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
# The types in which an operation that refuses float64 is tried, each with its complex one.
_OWN = (
    (torch.float32, torch.complex64),
    (torch.bfloat16, torch.complex64),
    (torch.float16, torch.complex32),
)
# They make tensors of Python's numbers, which are in float64 until then.
_CONSTANTS = {"tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor"}
# Their default type is a float.
_RANDOM = {torch.ops.aten.rand.default, torch.ops.aten.randn.default}
_CASTS = {"to_copy": "cast", "convert_element_type": "cast", "lift_fresh": "constant"}

_PARITY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_HARNESS = tuple(os.path.join(_PARITY, name, "") for name in ("frameworks", "check"))
_INSIDE = os.path.dirname(torch.__file__) + os.sep, os.path.abspath(__file__)

Operation = Callable[..., object]
ValueT = TypeVar("ValueT")

# Functions that autocast runs in a type of 16 bits.
_AUTOCAST = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}
_AUTOCAST |= {"conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}


class Held:
    """The narrow constants that a program meets, each with its float64 copy.

    What is written into a constant in place stays in the copy, so that keep one `Held` for as long
    as the model.

    Args:
        names: of constants, for the log.
        move: by half a unit in the last place of its own type, up or down at random, what rounding
            may have changed when it was made. Round numbers stay.
    """

    def __init__(self, names: Mapping[str, torch.Tensor] | None = None, move: bool = False):
        self._wide = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        self._names.update({tensor: name for name, tensor in (names or {}).items()})
        self._move = move

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has a copy."""
        return tensor in self._wide

    def wide(self, tensor: torch.Tensor, log: "Log") -> torch.Tensor:
        """Return a tensor in float64: itself, or always the same copy of a narrow one."""
        if tensor.dtype not in _WIDE:
            return tensor
        if tensor not in self._wide:
            with _disable_current_modes():
                copy, rounded = tensor.to(_WIDE[tensor.dtype]), False
                if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                    array = _array(tensor)
                    step = half_units(array)
                    wide = unrounded(array) + (step if self._move else 0.0)
                    copy = torch.from_numpy(np.asarray(wide)).to(copy)
                    rounded = bool(step.any())
            self._wide[tensor] = copy, rounded
        copy, rounded = self._wide[tensor]
        if rounded:
            log.met(tensor, self._names.get(tensor, ""))
        return copy


class Log:
    """What a lifted program ran."""

    def __init__(self) -> None:
        self.num_operations = 0
        self.lifted: Counter[str] = Counter()
        self.impure: Counter[str] = Counter()
        self._met = WeakTensorKeyDictionary()

    @property
    def purity(self) -> Purity:
        """What was counted until now."""
        return Purity(self.num_operations, dict(self.impure), dict(self.lifted))

    def met(self, tensor: torch.Tensor, name: str) -> None:
        """Count a constant that rounding may have changed, once."""
        if tensor not in self._met:
            self._met[tensor] = True
            self.lifted[_described(tensor.dtype, f"constant {name}".rstrip())] += 1


@contextlib.contextmanager
def lifted(held: Held | None = None) -> Iterator[Log]:
    """Run everything in float64.

    Only the present thread is lifted, with the backward passes that it starts. A tensor without a
    type is float64, as if that were torch's default. What is compiled runs as it was written.
    Operations that refuse float64 run in the widest type that they take, and the log says so.

    Args:
        held: constants that were met before, of the same model.

    Yields:
        A log of what asked for a narrower type.
    """
    lift = _Lift(held or Held())
    with contextlib.ExitStack() as modes:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it is slow
            modes.enter_context(torch.compiler.set_stance("force_eager"))
        # Optimized programs of scripts keep constants that were folded in float64.
        modes.enter_context(torch.jit.optimized_execution(False))
        modes.enter_context(_Below(lift))
        modes.enter_context(_Above(lift))
        yield lift.log


def line_of_error(error: BaseException) -> str:
    """Return function and line of the user's code that raised."""
    stack = reversed(list(traceback.walk_tb(error.__traceback__)))
    return next((_line(frame, line) for frame, line in stack if _is_users(frame)), "top")


def is_rounded(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds narrow floats that rounding may have changed."""
    return is_narrow(tensor) and bool(half_units(_array(tensor)).any())


def is_narrow(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds floats narrower than 64 bits."""
    return tensor.dtype in _WIDE


class _Above(TorchFunctionMode):
    def __init__(self, lift: "_Lift"):
        super().__init__()
        self._lift = lift

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self._lift.called(func, args, kwargs or {})


class _Below(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, lift: "_Lift"):
        super().__init__()
        self._lift = lift

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with (
            torch._C.DisableTorchFunction()
        ):  # of a tensor's type, the other mode says the wide one
            return self._lift.run(func, args, kwargs or {})


class _Lift:
    """Both modes of one lifted program."""

    def __init__(self, held: Held):
        self._held, self.log = held, Log()

    def called(self, func: Operation, args: tuple, kwargs: dict) -> object:
        """Call a function as the user does, with wide constants."""
        name = getattr(func, "__name__", "").strip("_")
        args, kwargs = self._map(args, self._tensor), self._map(kwargs, self._tensor)
        if name in _CONSTANTS:
            return self._constant(func, args, kwargs)
        if name in _AUTOCAST and torch.is_autocast_enabled("cpu"):  # it casts float32 alone
            dtype = torch.get_autocast_dtype("cpu")
            self.log.lifted[_described(dtype, "autocast")] += 1
        if name in ("grad", "backward") and getattr(func, "__module__", "").startswith("torch."):
            return self._backward(func, args, kwargs)
        if name == "grouped_mm" and _is_wide(args[0]):
            self.log.lifted[_described(torch.float32, "grouped product")] += 1
            return _grouped_product(*args, **kwargs)
        if name == "rms_norm":
            return _rms_norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def run(self, func: Operation, args: tuple, kwargs: dict[str, object]) -> object:
        """Run an operation of torch's dispatcher in float64."""
        self.log.num_operations += 1
        if func is torch.ops.aten.view.dtype:
            return self._bits(func, *args)
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable and self._is_new((args, kwargs)):
            return func(*args, **kwargs)  # torch itself fills what is not yet given to anyone

        def change(value: object) -> object:
            if isinstance(value, torch.dtype) and value in _WIDE:
                self.log.lifted[_described(value, _CASTS.get(_name(func), _name(func)))] += 1
                return _WIDE[value]
            return self._tensor(value)

        args, kwargs = self._map(args, change), self._map(kwargs, change)
        if func in _RANDOM:  # not run twice, for it draws
            kwargs = {"dtype": torch.float64} | kwargs
        try:
            found = func(*args, **kwargs)
        except Exception as error:
            return self._refused(func, args, kwargs, error)
        if schema is None:  # of higher order
            self.log.impure[_described(torch.float64, f"{_name(func)}, not seen inside")] += 1
        elif _is_narrow(found):
            found = self._by_default(func, args, kwargs)
        return self._widened(func, found) if _is_narrow(found) else found

    def _is_new(self, arguments: object) -> bool:
        """Whether tensors are narrow, and none of them has a wide copy."""
        tensors = _tensors(arguments)
        return not any(map(_is_wide, tensors)) and not any(map(self._held.knows, tensors))

    def _tensor(self, value: object) -> object:
        return self._held.wide(value, self.log) if isinstance(value, torch.Tensor) else value

    def _map(self, value: ValueT, change: Operation) -> ValueT:
        """Change all that arguments hold, in tuples, lists and dicts."""
        mapped: object
        if isinstance(value, tuple | list) and type(value) in (tuple, list, torch.Size):
            mapped = type(value)([self._map(x, change) for x in value])
        elif isinstance(value, dict) and type(value) is dict:
            mapped = {key: self._map(x, change) for key, x in value.items()}
        else:
            mapped = change(value)
        return cast(ValueT, mapped)

    def _constant(self, func: Operation, args: tuple, kwargs: dict[str, object]) -> object:
        """Make a tensor of numbers: of Python's in float64, of narrow arrays as they are."""
        dtype = kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and dtype in _WIDE:
            self.log.lifted[_described(dtype, "constant")] += 1
            kwargs = kwargs | {"dtype": _WIDE[dtype]}
        elif dtype is None:
            with _disable_current_modes():
                found = func(*args, **kwargs)
            if isinstance(found, torch.Tensor) and found.dtype in _WIDE:
                given = (*args, *kwargs.values())
                if any(isinstance(x, np.ndarray | np.generic) for x in given):
                    return found  # rounded before
                kwargs = kwargs | {"dtype": _WIDE[found.dtype]}
        return func(*args, **kwargs)

    def _backward(self, func: Operation, args: tuple, kwargs: dict[str, object]) -> object:
        """Take gradients with this mode entered, for what a checkpoint runs again meanwhile."""
        if func is torch.Tensor.backward:
            kwargs = {"grad_tensors" if k == "gradient" else k: x for k, x in kwargs.items()}
            func = torch.autograd.backward
        # Else the function would call this mode once more, and not itself.
        torch.autograd.has_torch_function = lambda args: False
        try:
            with _Above(self):
                return func(*args, **kwargs)
        finally:
            torch.autograd.has_torch_function = has_torch_function

    def _by_default(self, func: Operation, args: tuple, kwargs: dict[str, object]) -> object:
        """Run an operation again whose result has torch's default type, as if it were float64."""
        found = func(*args, **kwargs)
        schema = func._schema  # type: ignore[attr-defined]  # of an OpOverload
        if schema.is_mutable:
            return found
        if kwargs.get("dtype") is None and any(x.name == "dtype" for x in schema.arguments):
            is_complex = any(x.is_complex() for x in _tensors(found))
            wide = {"dtype": torch.complex128 if is_complex else torch.float64}
            with contextlib.suppress(Exception):
                return func(*args, **kwargs | wide)

        def change(value: object) -> object:
            return value.double() if _is_integral(value) else value

        with contextlib.suppress(Exception):
            found = func(*self._map(args, change), **self._map(kwargs, change))
        return found

    def _bits(self, func: Operation, tensor: torch.Tensor, dtype: torch.dtype) -> object:
        """View the bits of a tensor as another type, which is about the narrow type itself."""
        floats = {4: torch.float32, 2: torch.bfloat16}
        if dtype.itemsize in floats and not dtype.is_floating_point and _is_wide(tensor):
            tensor = tensor.to(floats[dtype.itemsize])
            self.log.impure[_described(tensor.dtype, "bits")] += 1
        return func(tensor, dtype)

    def _refused(
        self, func: Operation, args: tuple, kwargs: dict[str, object], error: Exception
    ) -> object:
        """Run an operation that refuses float64 in a type that it takes; raise if there is none."""
        for real, imaginary in _OWN:
            pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

            def change(value, real=real, imaginary=imaginary, pairs=pairs):
                if isinstance(value, torch.dtype):
                    return {torch.float64: real, torch.complex128: imaginary}.get(value, value)
                if not _is_wide(value):
                    return value
                pairs.append((value, value.to(imaginary if value.is_complex() else real)))
                return pairs[-1][1]

            narrow = self._map(args, change), self._map(kwargs, change)
            if not pairs:
                break
            try:
                found = func(*narrow[0], **narrow[1])
            except Exception:
                continue
            self.log.impure[_described(real, _name(func))] += 1
            schema = getattr(func, "_schema", None)
            if schema is not None and schema.is_mutable:
                for wide, copy in pairs:
                    wide.copy_(copy)

            def back(value, pairs=pairs):
                return next((wide for wide, copy in pairs if copy is value), _to_wide(value))

            return self._map(found, back)
        raise error

    def _widened(self, func: Operation, found: object) -> object:
        """Widen a result that stayed narrow, and say so."""
        dtype = next(x.dtype for x in _tensors(found) if x.dtype in _WIDE)
        self.log.impure[_described(dtype, _name(func))] += 1
        return self._map(found, _to_wide)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Return a narrow tensor as an array; types that NumPy lacks as float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.complex64):
        return numpy_view(tensor)
    return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32).numpy()


def _tensors(value: object) -> list[torch.Tensor]:
    return [x for x in leaves_of(value) if isinstance(x, torch.Tensor)]


def _is_narrow(value: object) -> bool:
    return any(map(is_narrow, _tensors(value)))


def _is_wide(value: object) -> TypeGuard[torch.Tensor]:
    wide = torch.float64, torch.complex128
    return isinstance(value, torch.Tensor) and value.dtype in wide


def _is_integral(value: object) -> TypeGuard[torch.Tensor]:
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.is_quantized)


def _to_wide(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.dtype in _WIDE:
        return value.to(_WIDE[value.dtype])
    return value


def _name(func: Operation) -> str:
    schema = getattr(func, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else str(func)
    return name.strip("_")


def _described(dtype: torch.dtype, what: str) -> str:
    """Describe an operation with its narrow type and the line of the user's code it is for."""
    words = f"{str(dtype).removeprefix('torch.')} {what}"
    place = _place(sys._getframe(1))
    return f"{words} at {place}" if place else words


def _place(frame: FrameType | None) -> str:
    """Return the function and line that called torch; "" where the harness did."""
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    return _line(frame, frame.f_lineno) if frame is not None and _is_users(frame) else ""


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith(_INSIDE + _HARNESS)


def _line(frame: FrameType, number: int) -> str:
    code = frame.f_code
    name = code.co_qualname.rpartition("<locals>.")[2]
    return f"{name} ({os.path.basename(code.co_filename)}:{number})"


def _rms_norm(func: Operation, x, shape, weight=None, eps: float | None = None) -> object:
    """Normalize with the epsilon that float32 has by default, not with float64's."""
    return func(x, shape, weight, torch.finfo(torch.float32).eps if eps is None else eps)


def _grouped_product(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiply groups of matrices; `offs` are the ends of the groups along the shared axis."""
    if offs is None:
        return torch.bmm(a, b)
    ends = offs.tolist()
    groups = list(zip([0, *ends], ends, strict=False))
    if a.ndim == b.ndim == 2:
        found = torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    elif a.ndim == 2:
        rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])
        products = [a[i:j] @ matrix for (i, j), matrix in zip(groups, b, strict=True)]
        found = torch.cat([*products, rest])
    else:
        rest = a.new_zeros(a.shape[1], b.shape[-1] - ends[-1])
        products = [matrix @ b[:, i:j] for (i, j), matrix in zip(groups, a, strict=True)]
        found = torch.cat([*products, rest], -1)
    return found if bias is None else found + bias
