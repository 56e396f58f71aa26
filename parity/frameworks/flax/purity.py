"""Find the operations of a jax program that are narrower than float64."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from parity.frameworks.purity import Purity

# They round without a narrow type, or cannot be examined.
_OPAQUE = {"reduce_precision", "pure_callback", "io_callback"}


def flax_purity(function: Callable[..., object], *args: object) -> Purity:
    """Return the purity of the jaxpr of function(*args), and of those inside it."""
    seen = [
        (f"{equation.primitive.name} at {equation.source_info.name_stack or 'top'}", equation)
        for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr)
    ]
    impure = Counter(
        name
        for name, equation in seen
        if equation.primitive.name in _OPAQUE
        or any(_is_narrow(v.aval) for v in (*equation.invars, *equation.outvars))
    )
    return Purity(len(seen), dict(impure))


def _is_narrow(aval: object) -> bool:
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return jnp.finfo(dtype).bits < 64


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
