"""The weights of a Flax NNX module as named NumPy arrays: read, load and cast."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.leaves import Arrays, Leaves, dotted, require_same


def flax_leaves(module: nnx.Module) -> Leaves:
    """Return every variable of a module by its path, without the states of random streams."""
    return {name: np.array(variable[...]) for name, variable in _variables(module).items()}


def state_leaves(state: nnx.State) -> Leaves:
    """Return a state shaped like a module, such as gradients or moments, by the path of leaves."""
    return {dotted(path): np.asarray(x[...]) for path, x in nnx.to_flat_state(state)}


def load_flax(module: nnx.Module, leaves: Arrays) -> None:
    """Overwrite every variable of a module; names, shapes and dtypes must be equal."""
    variables = _variables(module)
    require_same("flax", {x: np.asarray(v[...]) for x, v in variables.items()}, leaves)
    # Without 64-bit types jax would round a float64 leaf to float32 on its way in.
    wide = any(leaf.dtype.itemsize == 8 for leaf in leaves.values())
    with jax.enable_x64(wide or jnp.result_type(float) == jnp.float64):
        for name, variable in variables.items():
            # As it was placed: an array that is tied to its device would tie what is computed from
            # it, and a program is compiled again for each mixture of tied and free arguments.
            array = variable[...]
            place = array.sharding if array.committed else None
            variable.set_value(jax.device_put(leaves[name], place))


def cast_flax(module: nnx.Module, dtype: str) -> nnx.Module:
    """Copy a module into a float type: its variables, and the compute dtypes of its layers."""
    copy = nnx.clone(module)
    for _, submodule in nnx.iter_modules(copy):
        for name in ("dtype", "param_dtype"):
            held = getattr(submodule, name, None)
            if held is not None and jnp.issubdtype(held, jnp.floating):
                setattr(submodule, name, jnp.dtype(dtype))
    for _, variable in nnx.to_flat_state(nnx.state(copy)):
        if jnp.issubdtype(variable[...].dtype, jnp.floating):
            variable.set_value(jnp.asarray(np.asarray(variable[...]), dtype))
    return copy


def _variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    flat = nnx.to_flat_state(nnx.state(module))
    return {
        dotted(path): variable for path, variable in flat if not isinstance(variable, nnx.RngState)
    }
