"""The float64 oracle: copies of foreign modules, and the proof that a run really is float64.

In float64 two correct programs agree to 1e-15 and the smallest bug shows at 1e-5, so nobody has to
argue about a tolerance. One operation that falls back to float32 spoils that, silently.
"""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.utils._python_dispatch import TorchDispatchMode

# They round without a narrow type, or hide what they do.
_OPAQUE = {"reduce_precision", "pure_callback", "io_callback"}


@dataclasses.dataclass(frozen=True)
class Purity:
    """What a run was made of.

    Attributes:
        num_operations: operations looked at.
        impure: operations that took or gave a float narrower than 64 bits, or hide what they do,
            with their counts.
    """

    num_operations: int
    impure: dict[str, int]


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


def torch_purity(function: Callable[..., Any], *args: Any) -> Purity:
    """Watches every operation that function(*args) dispatches, backward passes included.

    What leaves torch, for NumPy say, is not seen.
    """
    with _Watch() as watch:
        function(*args)
    return Purity(watch.num_operations, dict(watch.impure))


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


def torch_in(module: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """A copy of any module in a float type, on the host."""
    return copy.deepcopy(module).to("cpu", getattr(torch, dtype))


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_operations = 0
        self.impure: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.num_operations += 1
        values = torch.utils._pytree.tree_leaves((args, kwargs, outputs))
        if any(_is_narrow_torch(value) for value in values):
            self.impure[str(func)] += 1
        return outputs


def _is_narrow_torch(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and torch.finfo(value.dtype).bits < 64
    )


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
