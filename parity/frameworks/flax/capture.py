"""Inputs, outputs and gradients of every submodule's calls in a Flax NNX module."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.capture import Backward, OnTrace, ValueT, emit, leaves_of, map_leaves
from parity.frameworks.leaves import dotted

Call = Callable[..., object]
# (path of a module, its bound `__call__`, positional arguments, keywords) to the output to use.
Around = Callable[[str, Call, tuple, dict[str, object]], object]
# Zeros shaped like the float inputs, and like the first float output, of one call.
_Zeros = tuple[list[jax.Array], list[jax.Array]]


def capture_flax(module: nnx.Module, call: Callable[[], object], on_trace: OnTrace) -> None:
    """Run `call` and emit a trace of every submodule's calls, in order of completion."""

    def around(path: str, call: Call, args: tuple, kwargs: dict[str, object]) -> object:
        output = call(*args, **kwargs)
        # What is traced, as in the body of a scan, has no numbers.
        if not _is_traced((args, kwargs, output)):
            emit(on_trace, path, (args, kwargs), output, jax.Array, np.asarray)
        return output

    with wrapped_calls(module, around):
        call()


def backward_flax(module: nnx.Module, loss: Callable[[], jax.Array]) -> list[Backward]:
    """Return the gradients of a loss at every submodule's calls, the last call first.

    Zeros are added to every float that goes in or comes out, and the loss is derived by them.
    Submodules that are called in the body of a scan have no gradient of their own.
    """
    zeros, order = _zeros_of_calls(module, loss)

    def moved(added: dict[str, list[_Zeros]]) -> jax.Array:
        counts: Counter[str] = Counter()

        def around(path: str, call: Call, args: tuple, kwargs: dict[str, object]) -> object:
            if path not in added:
                return call(*args, **kwargs)
            inputs, outputs = (iter(x) for x in added[path][counts[path]])
            counts[path] += 1
            args, kwargs = _with_floats((args, kwargs), lambda x: x + next(inputs))
            return _with_floats(call(*args, **kwargs), lambda x: x + next(outputs, 0))

        with wrapped_calls(module, around):
            return loss()

    gradients = jax.grad(moved)(zeros)
    back = []
    for path, number in order:
        inputs, outputs = gradients[path][number]
        by_output = np.asarray(outputs[0]) if outputs else None
        back.append(Backward(path, tuple(map(np.asarray, inputs)), by_output))
    return back[::-1]


def _zeros_of_calls(
    module: nnx.Module, loss: Callable[[], jax.Array]
) -> tuple[dict[str, list[_Zeros]], list[tuple[str, int]]]:
    """Return the zeros of each call by path, and (path, number) of the calls as they start."""
    zeros: dict[str, list[_Zeros]] = {}
    order: list[tuple[str, int]] = []
    traced: set[str] = set()

    def around(path: str, call: Call, args: tuple, kwargs: dict[str, object]) -> object:
        calls = zeros.setdefault(path, [])
        order.append((path, len(calls)))
        inputs, outputs = [], []
        calls.append((inputs, outputs))
        _with_floats((args, kwargs), lambda x: inputs.append(jnp.zeros_like(x)))
        output = call(*args, **kwargs)
        _with_floats(output, lambda x: outputs.append(jnp.zeros_like(x)))
        del outputs[1:]
        if _is_traced((args, kwargs, output)):
            traced.add(path)
        return output

    with wrapped_calls(module, around):
        loss()
    for path in traced:
        del zeros[path]
    return zeros, [call for call in order if call[0] not in traced]


def _with_floats(value: ValueT, change: Callable[[jax.Array], object]) -> ValueT:
    """Apply `change` to the float arrays among arguments or outputs."""

    def changed(x: object) -> object:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
            return change(x)
        return x

    return map_leaves(value, changed)


def _is_traced(value: object) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in leaves_of(value))


@contextlib.contextmanager
def wrapped_calls(module: nnx.Module, around: Around) -> Iterator[None]:
    """Route every submodule's call through `around`; `__call__` is restored on leaving.

    A copy of the whole module, as `nnx.merge` makes one with every call of a pure function, counts
    as the module. `around` makes the call, or something in its place.
    """
    paths: dict[int, str] = {}
    known: list[nnx.Module] = []  # keeps what is in paths alive, since ids are used again
    running: set[int] = set()

    def learn(root: nnx.Module) -> None:
        for path, submodule in nnx.iter_modules(root):
            paths[id(submodule)] = dotted(path)
            known.append(submodule)

    learn(module)
    classes = {type(submodule) for submodule in known}
    owners = {base for cls in classes for base in cls.__mro__ if "__call__" in vars(base)}
    originals = {owner: vars(owner)["__call__"] for owner in owners if owner is not object}

    def wrap(original: Call) -> Call:
        def __call__(self, *args, **kwargs):
            if id(self) not in paths and type(self) is type(module) and not running:
                learn(self)
            # A parent's __call__ reached through super() is not a call of its own.
            if id(self) not in paths or id(self) in running:
                return original(self, *args, **kwargs)
            running.add(id(self))
            try:
                return around(paths[id(self)], functools.partial(original, self), args, kwargs)
            finally:
                running.discard(id(self))

        return __call__

    try:
        for owner, original in originals.items():
            owner.__call__ = wrap(original)
        yield
    finally:
        for owner, original in originals.items():
            owner.__call__ = original
