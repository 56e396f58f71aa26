"""Lifted float64: jax computes with a float64 wherever a program asks for a narrower float.

Models cast to float32 inside of norms and softmaxes, whatever type they are in, and a float64 run
of them proves little. While lifted, jax has the types that it has without 64-bit types, except that
every float is a float64 and every complex number a complex128: integers keep the 32 bits for which
the program was written, and random draws the bits that they have in float32.

Types are widened where a program names them, so that no constant is rounded on its way, and again
where jax binds operands to an operation, which everything passes, eager or traced. jax keeps the
programs that it traces by context; a lifted run is a context of its own.
"""

import contextlib
import functools
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src import callback, core, dtypes, literals, pjit, source_info_util
from jax._src.array import ArrayImpl
from jax._src.interpreters import partial_eval
from jax._src.lax import lax
from jax._src.numpy import array_constructors

import parity
from parity.frameworks.rounding import half_units, unrounded

_F64, _C128 = np.dtype(np.float64), np.dtype(np.complex128)
# Narrower types of floats, with the one that stands for each. Types of jax's own are in no table.
_WIDE: dict[object, np.dtype] = {
    np.dtype(x): _C128 if jnp.issubdtype(x, jnp.complexfloating) else _F64
    for x in vars(jnp).values()
    if isinstance(x, type(jnp.float32)) and jnp.issubdtype(x, jnp.inexact)
}
del _WIDE[_F64], _WIDE[_C128]
# What jax without 64-bit types has in the place of integers of 64 bits.
_SHORT: dict[object, np.dtype] = {
    np.dtype(f"{kind}64"): np.dtype(f"{kind}32") for kind in ("int", "uint")
}
# Numbers are drawn from as many bits as their type has.
_DRAWN: dict[object, np.dtype] = {_F64: np.dtype(np.float32), _C128: np.dtype(np.complex64)}
_BITWISE = ("bitcast_convert_type", "view")  # they read bits, whose number is the program's
_CALLBACKS = ("pure_callback", "io_callback")  # their functions expect the types that they name
_CASTS = ("astype", "convert_element_type", "asarray", "array", "")
_HELD = (ArrayImpl, int, literals.TypedNdArray, *literals.typed_scalar_types)

Function = Callable[..., object]


class Log(Counter[str]):
    """What was lifted, such as "float32 cast at Norm.__call__ (port.py:12)", with counts.

    An operation is counted when it is traced. A constant was rounded before it is met: its last
    bits are those of its type. One that is exact, as a mask, is left out.

    Args:
        moves: constants by half a unit in the last place of their type, up or down at random: by
            what rounding may have changed them. Round numbers stay.
    """

    def __init__(self, moves: bool = False) -> None:
        super().__init__()
        self._moves, self._met = moves, set[tuple[str, int]]()

    def __eq__(self, other: object) -> bool:
        return self is other  # a context is known by its log

    def __hash__(self) -> int:
        return id(self)

    def add(self, what: str) -> None:
        """Count an operation."""
        self[f"{what} at {user_line()}"] += 1

    def wide(self, array: np.ndarray, name: str | None = None) -> np.ndarray:
        """Return a narrow array in its wide type, and count it, if it was rounded.

        Args:
            array: of floats or complex numbers.
            name: of the array; it is counted once at each line when None.
        """
        step = half_units(array)
        if step.any():
            words = f"{array.dtype} constant {name or f'at {user_line()}'}"
            if (words, hash(array.tobytes())) not in self._met:
                self._met.add((words, hash(array.tobytes())))
                self[words] += 1
        return unrounded(array) + step if self._moves else unrounded(array)


_log = jax.make_user_context(None)
_lock = threading.Lock()
_installed = contextlib.ExitStack()
_num_inside = 0


@contextlib.contextmanager
def lifted(log: Log | None = None) -> Iterator[Log]:
    """Run jax in this thread with every narrower float widened.

    Args:
        log: that of a run before, whose traced programs are used again and not logged anew. All is
            traced, and logged, when None.

    Yields:
        The log.
    """
    global _num_inside
    log = Log() if log is None else log
    with _lock:
        if not _num_inside:
            _install()
        _num_inside += 1
    try:
        with jax.enable_x64(True), _log(log):
            yield log
    finally:
        with _lock:
            _num_inside -= 1
            if not _num_inside:
                _installed.close()


def is_lifted() -> bool:
    """Whether this thread is inside of `lifted`."""
    return _log.value is not None


def is_narrow(dtype: np.dtype) -> bool:
    """Whether a type is one of floats or complex numbers, and narrower than float64."""
    return dtype in _WIDE


def _install() -> None:
    """Replace functions of jax by such as act in lifted threads alone."""
    for owner, name, lift in (
        (dtypes, "dtype", _lift_found),
        (dtypes, "to_inexact_dtype", _lift_found),
        (dtypes, "to_floating_dtype", _lift_found),
        (dtypes, "to_complex_dtype", _lift_found),
        (dtypes, "_canonicalize_dtype", _lift_canonical),
        (dtypes, "_maybe_canonicalize_explicit_dtype", _lift_explicit),
        (dtypes, "check_and_canonicalize_user_dtype", _lift_requested),
        (dtypes, "default_int_dtype", _lift_default),
        (dtypes, "default_uint_dtype", _lift_default),
        (array_constructors, "array", _lift_held),
        (jnp, "array", _lift_held),
        (lax, "_convert_element_type", _lift_held),
        (callback, "_check_shape_dtype", lambda original: lambda result: None),
        (partial_eval.DynamicJaxprTrace, "new_const", _lift_constant),
        (pjit, "_run_python_pjit", _lift_call),
        (pjit, "_get_fastpath_data", _lift_fastpath),
        (core.Primitive, "bind", _lift_bind),
    ):
        original = getattr(owner, name)
        _installed.callback(setattr, owner, name, original)
        setattr(owner, name, _in_lifted_threads(original, lift(original)))
    tables: tuple[tuple[dict, tuple, Callable[..., Function]], ...] = (
        (dtypes._DEFAULT_TYPEMAP, (int,), _lift_default),
        (dtypes.default_types, ("i", "u"), _lift_default),
        (core.pytype_aval_mappings, _HELD, _lift_type),
    )
    for table, keys, lift in tables:
        for key in keys:
            original = table[key]
            _installed.callback(table.__setitem__, key, original)
            table[key] = _in_lifted_threads(original, lift(original))


def _in_lifted_threads(original: Function, replacement: Function) -> Function:
    @functools.wraps(original)
    def chosen(*args, **kwargs):
        return (original if _log.value is None else replacement)(*args, **kwargs)

    return chosen


# Types that programs name


def _lift_found(original: Function) -> Function:
    """Widen the type that a value has, or that its type becomes."""

    def found(x: object) -> object:
        dtype = original(x)
        return _WIDE.get(dtype, dtype)

    return found


def _lift_canonical(original: Function) -> Function:
    """Widen a type that is implied, as that of a NumPy array."""

    def canonical(x64: bool, allow_extended: bool, dtype: object) -> object:
        return _like_32_bits(original(x64, allow_extended, dtype))

    return canonical


def _lift_explicit(original: Function) -> Function:
    """Widen a type that is asked for."""

    def explicit(dtype: np.dtype, fun_name: str = "") -> object:
        found = original(dtype, fun_name)
        if fun_name in _BITWISE:
            return found
        if fun_name == "dtype":  # of a value, or a promotion of some
            return _WIDE.get(found, found)
        if found in _WIDE:
            _log.value.add(f"{found} {'cast' if fun_name in _CASTS else fun_name}")
        return _like_32_bits(found)

    return explicit


def _lift_requested(original: Function) -> Function:
    """Keep the types of random draws as they are without 64-bit types."""

    def requested(dtype: np.dtype | type | str, fun_name: str | None = None) -> object:
        if sys._getframe(2).f_globals["__name__"].startswith("jax._src.random"):
            found = np.dtype(dtype) if not dtypes.issubdtype(dtype, dtypes.extended) else dtype
            return (_DRAWN | _SHORT).get(found, found)
        return original(dtype, fun_name)

    return requested


def _lift_default(original: Function) -> Function:
    return lambda: _SHORT[original()]


def _like_32_bits(dtype: object) -> object:
    return _WIDE.get(dtype) or _SHORT.get(dtype, dtype)


# Values and operations


class _Widened(list[object]):
    """Arguments of which some were widened."""


def _lift_type(original: Callable[[object], core.ShapedArray]) -> Function:
    def aval(x: object) -> core.AbstractValue:
        if type(x) is int and isinstance(short := _widened(x), literals.TypedInt):
            return short.aval
        found = original(x)
        return found.update(dtype=_WIDE[found.dtype]) if found.dtype in _WIDE else found

    return aval


def _lift_constant(original: Function) -> Function:
    """Widen a value that a traced function holds."""

    def constant(trace: object, value: object, *others: object, **named: object) -> object:
        return original(trace, _widened(value), *others, **named)

    return constant


def _lift_held(original: Function) -> Function:
    """Widen a NumPy array on its way into jax."""

    def held(value: object, *others: object, **named: object) -> object:
        is_held = isinstance(value, np.ndarray | np.generic) and value.dtype in _WIDE
        return original(_widened(value) if is_held else value, *others, **named)

    return held


def _lift_call(original: Callable[..., tuple]) -> Function:
    """Widen what a jitted function is given."""

    def call(program: object, given: list[object], *others: object) -> tuple[object, ...]:
        # A NumPy array could reach the program in the type in which another scope met it.
        wide = [jnp.asarray(x) if type(x) is np.ndarray else x for x in map(_widened, given)]
        found = original(program, wide, *others)
        same = all(x is y for x, y in zip(wide, given, strict=True))
        return found if same else (*found[:3], _Widened(found[3]), *found[4:])

    return call


def _lift_fastpath(original: Function) -> Function:
    """Let later calls come by here where these were widened: jax would hand on what it is given."""

    def fastpath(executable: object, out_tree: object, given: object, *others: object) -> object:
        if isinstance(given, _Widened):
            return None
        return original(executable, out_tree, given, *others)

    return fastpath


def _lift_bind(original: Function) -> Function:
    def bind(primitive: core.Primitive, *args: object, **params) -> object:
        name = primitive.name
        if name == "bitcast_convert_type" or name in _CALLBACKS:
            return original(primitive, *_as_expected(original, args, params), **params)
        for key, value in params.items():
            if isinstance(value, np.dtype | type) and (dtype := _narrow(value)):
                _log.value.add(f"{dtype} {'cast' if name in _CASTS else name}")
                params[key] = _WIDE[dtype]
        if name == "reduce_precision" and params["mantissa_bits"] < 52:
            _log.value.add(name)
            params |= {"exponent_bits": 11, "mantissa_bits": 52}
        if isinstance(params.get("precision"), lax.DotAlgorithm | lax.DotAlgorithmPreset):
            _log.value.add(f"{params['precision']}")
            params["precision"] = None
        return original(primitive, *(_widened(x, original) for x in args), **params)

    return bind


def _narrow(named: np.dtype | type) -> np.dtype | None:
    """Return the dtype that a parameter names, if it is narrow."""
    found = getattr(named, "dtype", named) if isinstance(named, type) else named
    if isinstance(found, type):
        found = np.dtype(found) if issubclass(found, np.generic) else None
    return found if found in _WIDE else None


def _as_expected(bind: Function, args: tuple[object, ...], params: dict) -> list[object]:
    """Return the operands of an operation that stays in narrow types, if it has them."""
    results = params.get("result_avals")
    if results is None:  # a bit cast to a type of as many bits
        narrow = params["new_dtype"].itemsize < 8
    else:
        narrow = any(x.dtype in _WIDE for x in results)
    return [
        bind(lax.convert_element_type_p, x, new_dtype=dtype, weak_type=False, sharding=None)
        if narrow and (dtype := _DRAWN.get(core.typeof(x).dtype))
        else x
        for x in args
    ]


def _widened(x: object, bind: Function | None = None) -> object:
    """Return a value in float64 if it holds narrower floats, a short integer if it is long."""
    if isinstance(x, core.Tracer):
        aval = x.aval
        if type(aval) is not core.ShapedArray or aval.dtype not in _WIDE:
            return x
        dtype, weak = _WIDE[aval.dtype], aval.weak_type
        cast = bind or core.Primitive.bind
        return cast(lax.convert_element_type_p, x, new_dtype=dtype, weak_type=weak, sharding=None)
    if type(x) is int:
        short = np.iinfo(np.int32)
        return literals.TypedInt(x, np.dtype(np.int32)) if short.min <= x <= short.max else x
    if isinstance(x, literals.TypedFloat | literals.TypedComplex) and x.dtype in _WIDE:
        make: Callable[..., object] = type(x)
        return make(x, _WIDE[x.dtype])
    if isinstance(x, ArrayImpl | literals.TypedNdArray):
        dtype = _WIDE.get(x.dtype)  # integers that jax made are as long as they have to be
    elif isinstance(x, np.ndarray | np.generic):
        dtype = _WIDE.get(x.dtype) or _SHORT.get(x.dtype)
    else:
        return x
    if dtype is None:
        return x
    held = np.asarray(x)
    wide = _log.value.wide(held) if x.dtype in _WIDE else held.astype(dtype)
    aval = core.ShapedArray(x.shape, dtype, weak_type=dtypes.is_weakly_typed(x))
    return literals.TypedNdArray(wide, aval)


def user_line(at: source_info_util.Traceback | None = None) -> str:
    """Return function and line of the user's code in a traceback, or else of flax or optax.

    When None the present ones, which in a backward pass are those of the operation that is derived.
    """
    frames = source_info_util.user_frames(at or source_info_util.current().traceback)
    found = _line((x.file_name, x.function_name, x.start_line) for x in frames)
    # jax cuts the traceback of what it traces for functions of its own.
    return found or _line_in(traceback.walk_stack(None))


def line_of_error(error: BaseException) -> str:
    """Return function and line of the user's code, as `user_line`, that raised."""
    return _line_in(reversed(list(traceback.walk_tb(error.__traceback__))))


def _line_in(stack: Iterable[tuple[FrameType, int]]) -> str:
    calls = ((x.f_code.co_filename, x.f_code.co_qualname, line) for x, line in stack)
    return _line(x for x in calls if source_info_util.is_user_filename(x[0])) or "top"


def _line(calls: Iterable[tuple[str, str, int]]) -> str:
    """Choose from file, function and line of calls, innermost first; "" where there is none."""
    found = ""
    for file, function, line in calls:
        if not file.startswith(_PARITY):
            where = f"{function.replace('<locals>.', '')} ({os.path.basename(file)}:{line})"
            if not file.startswith(_LIBRARIES):
                return where
            found = found or where
    return found


def _folder(name: str | None) -> str:
    return os.path.dirname(os.path.abspath(str(name))) + os.sep


_LIBRARIES = _folder(flax.__file__), _folder(optax.__file__)
_PARITY = _folder(parity.__file__)
