"""float64 copies of Flax NNX modules, and what a run of theirs is made of.

Read beside parity/torch_oracle.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.purity import Purity

# They round without a narrow type, or hide what they do.
_OPAQUE = {"reduce_precision", "pure_callback", "io_callback"}


def flax_purity(function: Callable[..., Any], *args: Any) -> Purity:
    """Reads the jaxpr of function(*args), and those inside it."""
    seen = [
        (f"{equation.primitive.name} at {equation.source_info.name_stack or 'top'}", equation)
        for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr)
    ]
    impure = Counter(
        name
        for name, equation in seen
        if equation.primitive.name in _OPAQUE
        or any(_is_narrow_jax(v.aval) for v in (*equation.invars, *equation.outvars))
    )
    return Purity(len(seen), dict(impure))


def flax_in(module: nnx.Module, dtype: str) -> nnx.Module:
    """A copy of any module in a float type: variables, and the compute dtypes its layers hold."""
    twin = nnx.clone(module)
    for _, submodule in nnx.iter_modules(twin):
        for name in ("dtype", "param_dtype"):
            held = getattr(submodule, name, None)
            if held is not None and jnp.issubdtype(held, jnp.floating):
                setattr(submodule, name, jnp.dtype(dtype))
    for _, variable in nnx.to_flat_state(nnx.state(twin)):
        if jnp.issubdtype(variable[...].dtype, jnp.floating):
            variable.set_value(jnp.asarray(np.asarray(variable[...]), dtype))
    return twin


def _is_narrow_jax(aval: Any) -> bool:
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
