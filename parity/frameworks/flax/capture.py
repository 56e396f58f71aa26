"""What goes into and comes out of every submodule of a Flax NNX module, forward and backward.

Read beside parity/torch_capture.py.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.capture import Backward, OnTrace, emit, leaves_of
from parity.frameworks.leaves import dotted

# Given a module's path, its call and what it is called with, what it shall have given.
Around = Callable[[str, Callable[..., Any], tuple, dict[str, Any]], Any]


def capture_flax(module: nnx.Module, call: Callable[[], Any], on_trace: OnTrace) -> None:
    """Runs `call` and tells what every submodule took and gave, in order of completion."""

    def around(path: str, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        # What is traced, as in the body of a scan, has no numbers.
        if not _is_traced((args, kwargs, output)):
            emit(on_trace, path, (args, kwargs), output, jax.Array, np.asarray)
        return output

    with _wrapped_calls(module, around):
        call()


def backward_flax(module: nnx.Module, loss: Callable[[], jax.Array]) -> list[Backward]:
    """The gradients of a loss by what every call of a submodule took and gave, the last one first.

    Zeros are added to every float that goes in or comes out, and the loss is derived by them.
    Submodules that are called in the body of a scan have no gradient of their own.
    """
    zeros, order = _zeros_of_calls(module, loss)

    def moved(added: dict[str, list]) -> jax.Array:
        counts: Counter[str] = Counter()

        def around(path: str, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            if path not in added:
                return call(*args, **kwargs)
            inputs, outputs = (iter(x) for x in added[path][counts[path]])
            counts[path] += 1
            args, kwargs = _with_floats((args, kwargs), lambda x: x + next(inputs))
            return _with_floats(call(*args, **kwargs), lambda x: x + next(outputs, 0))

        with _wrapped_calls(module, around):
            return loss()

    gradients = jax.grad(moved)(zeros)
    back = []
    for path, number in order:
        inputs, outputs = gradients[path][number]
        given = np.asarray(outputs[0]) if outputs else None
        back.append(Backward(path, tuple(map(np.asarray, inputs)), given))
    return back[::-1]


def _zeros_of_calls(
    module: nnx.Module, loss: Callable[[], jax.Array]
) -> tuple[dict[str, list], list[tuple[str, int]]]:
    """Zeros shaped like what each call takes and gives, by path, and the calls as they start."""
    zeros: dict[str, list] = {}
    order: list[tuple[str, int]] = []
    traced: set[str] = set()

    def around(path: str, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
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

    with _wrapped_calls(module, around):
        loss()
    for path in traced:
        del zeros[path]
    return zeros, [call for call in order if call[0] not in traced]


def _with_floats(value: Any, change: Callable[[jax.Array], Any]) -> Any:
    """Arguments or an output, with the arrays of floats among them changed."""
    if isinstance(value, jax.Array):
        return change(value) if jnp.issubdtype(value.dtype, jnp.floating) else value
    if type(value) in (tuple, list):
        return type(value)(_with_floats(x, change) for x in value)
    if type(value) is dict:
        return {key: _with_floats(x, change) for key, x in value.items()}
    return value


def _is_traced(value: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in leaves_of(value))


@contextlib.contextmanager
def _wrapped_calls(module: nnx.Module, around: Around) -> Iterator[None]:
    """Replaces `__call__` where it is defined, and puts it back whatever happens."""
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

    def wrap(original: Callable) -> Callable:
        def __call__(self, *args, **kwargs):
            # nnx.merge makes a new model of the same type with every call of a pure function.
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
