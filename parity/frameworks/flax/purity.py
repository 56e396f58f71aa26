"""Find the operations of a jax program that are narrower than float64."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

import jax
import jax.extend
import jax.numpy as jnp

from parity.frameworks.flax.lift import is_lifted, lifted, user_line
from parity.frameworks.purity import Purity

Jaxpr = jax.extend.core.Jaxpr
Equation = jax.extend.core.JaxprEqn
Variable = jax.extend.core.Var | jax.extend.core.Literal

# They cannot be examined.
_OPAQUE = {"pure_callback", "io_callback"}


def flax_purity(function: Callable[..., object], *args: object) -> Purity:
    """Return the purity of the jaxpr of function(*args), and of those inside it.

    Inside of `lifted` it is traced anew, and what is lifted on the way is in it.
    """
    lift = is_lifted()
    with lifted() if lift else contextlib.nullcontext(Counter[str]()) as log:
        seen = list(_equations(jax.make_jaxpr(function)(*args).jaxpr))
    impure = Counter(
        f"{equation.primitive.name} at {user_line(equation.source_info.traceback)}"
        for equation in seen
        if _is_impure(equation) and not (lift and _widens(equation))
    )
    return Purity(len(seen), dict(impure), dict(log))


def _is_impure(equation: Equation) -> bool:
    name = equation.primitive.name
    if name == "reduce_precision":  # it rounds without a narrow type
        return equation.params["mantissa_bits"] < jnp.finfo(jnp.float64).nmant
    return name in _OPAQUE or any(map(_is_narrow, (*equation.invars, *equation.outvars)))


def _widens(equation: Equation) -> bool:
    """Whether nothing is lost: bits are drawn as a narrow float, or one is made a float64."""
    name, inputs, outputs = equation.primitive.name, equation.invars, equation.outvars
    if name == "bitcast_convert_type":
        bits = cast(jax.core.ShapedArray, inputs[0].aval)  # of an array
        return not jnp.issubdtype(bits.dtype, jnp.inexact)
    return name == "convert_element_type" and not any(map(_is_narrow, outputs))


def _is_narrow(variable: Variable) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return jnp.finfo(dtype).bits < 64


def _equations(jaxpr: Jaxpr) -> Iterator[Equation]:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
