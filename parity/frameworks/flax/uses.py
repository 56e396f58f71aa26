"""How a forward pass of a Flax module uses each weight, from its jaxpr."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.extend
import numpy as np
from flax import nnx
from jax.interpreters import partial_eval

from parity.frameworks.flax.leaves import state_leaves
from parity.frameworks.uses import Use, Uses

Jaxpr = jax.extend.core.Jaxpr
Literal = jax.extend.core.Literal
Variable = jax.extend.core.Var
Equation = jax.extend.core.JaxprEqn

_SAME_AXES = {
    "convert_element_type",
    "copy",
    "copy_p",
    "rev",
    "slice",
    "dynamic_slice",
    "neg",
    "reduce_precision",
    "stop_gradient",
    "sharding_constraint",
}
_OPERATIONS = {"mul": "factor", "div": "factor", "add": "term", "sub": "term", "add_any": "term"}


class _View(NamedTuple):
    """A leaf in a jaxpr, and which of its axes each axis of the variable is; -1 for none."""

    leaf: str
    axes: tuple[int, ...]


def flax_uses(module: nnx.Module, call: Callable[[nnx.Module], object]) -> Uses:
    """Trace `call` and return the first use of every leaf of a module that its arrays need."""
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)

    def run(leaves: Sequence[jax.Array]) -> list[jax.Array]:
        output = call(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)))
        return [x for x in jax.tree.leaves(output) if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(run)(leaves).jaxpr
    places = state_leaves(jax.tree.unflatten(tree, [np.int64(x) for x in range(len(leaves))]))
    names = {int(place): name for name, place in places.items()}
    needed, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    kept = [place for place, is_used in enumerate(used) if is_used]
    views = {
        var: _View(names[place], tuple(range(len(_shape(var)))))
        for place, var in zip(kept, needed.invars, strict=True)
        if place in names
    }
    uses = _Reader(views)
    uses.read(needed, views)
    return uses.found


class _Reader:
    """Notes the first equation that computes with each leaf."""

    def __init__(self, views: Mapping[Variable, _View]):
        self.found: Uses = {}
        self._num_axes = {view.leaf: len(view.axes) for view in views.values()}

    def read(self, jaxpr: Jaxpr, views: Mapping[Variable, _View]) -> dict[Variable, _View]:
        """Read the equations of a jaxpr, some of whose variables are leaves; return all such."""
        views = dict(views)
        for equation in jaxpr.eqns:
            given = [None if isinstance(x, Literal) else views.get(x) for x in equation.invars]
            if not any(given):
                continue
            if inner := _inner(equation, given):
                for body, arguments in inner:
                    seen = self.read(body, dict(arguments))
                    if len(body.outvars) == len(equation.outvars):
                        for inside, outside in zip(body.outvars, equation.outvars, strict=True):
                            if not isinstance(inside, Literal) and inside in seen:
                                views[outside] = seen[inside]
                continue
            view = next(filter(None, given))
            if (axes := _passed(equation, view)) is not None:
                views[equation.outvars[0]] = _View(view.leaf, axes)
                continue
            for place, found in enumerate(given):
                if found is not None and found.leaf not in self.found:
                    self._note(equation, place, found)
        return views

    def _note(self, equation: Equation, place: int, view: _View) -> None:
        name = equation.primitive.name
        operation, labels = _OPERATIONS.get(name, "other"), ("",) * len(view.axes)
        if name == "dot_general":
            summed, shared = (x[place] for x in equation.params["dimension_numbers"])
            operation = "product"
            labels = tuple(
                "i" if x in summed else "" if x in shared else "o" for x in range(len(view.axes))
            )
        elif name == "conv_general_dilated" and place == 1:
            out, into, *window = equation.params["dimension_numbers"].rhs_spec
            by_axis = {out: "o", into: "i"} | {x: f"w{i}" for i, x in enumerate(window)}
            operation, labels = "product", tuple(by_axis[x] for x in range(len(view.axes)))
        elif name == "gather" and place == 0:
            looked_up = equation.params["dimension_numbers"].start_index_map
            operation = "table"
            labels = tuple("i" if x in looked_up else "o" for x in range(len(view.axes)))
        axes = dict(zip(view.axes, labels, strict=True))
        num = self._num_axes[view.leaf]
        self.found[view.leaf] = Use(
            len(self.found), operation, tuple(axes.get(x, "") for x in range(num))
        )


def _inner(
    equation: Equation, given: Sequence[_View | None]
) -> list[tuple[Jaxpr, list[tuple[Variable, _View]]]]:
    """Return the jaxprs that an equation calls, each with its variables that are leaves."""
    params, name = equation.params, equation.primitive.name
    if name == "cond":
        bodies, given = [x.jaxpr for x in params["branches"]], given[1:]
    elif name == "while":
        skipped, num = params["cond_nconsts"], params["body_nconsts"]
        bodies, given = [params["body_jaxpr"].jaxpr], given[skipped : skipped + num]
    else:
        held = [params[x] for x in ("jaxpr", "call_jaxpr", "fun_jaxpr") if x in params]
        bodies = [getattr(x, "jaxpr", x) for x in held[:1]]
    if name == "scan":
        num = params["num_consts"] + params["num_carry"]
        # One step sees one element of a stack.
        steps = [x and _View(x.leaf, x.axes[1:]) for x in given[num:]]
        given = [*given[:num], *steps]
    return [
        (body, [(var, view) for var, view in zip(body.invars, given, strict=False) if view])
        for body in bodies
    ]


def _passed(equation: Equation, view: _View) -> tuple[int, ...] | None:
    """Return the axes of what is still the leaf after an equation; None after a computation."""
    name, params = equation.primitive.name, equation.params
    if name in _SAME_AXES:
        return view.axes
    if name == "transpose":
        return tuple(view.axes[x] for x in params["permutation"])
    if name == "squeeze":
        return tuple(x for i, x in enumerate(view.axes) if i not in params["dimensions"])
    if name == "broadcast_in_dim":
        places = dict(zip(params["broadcast_dimensions"], view.axes, strict=True))
        return tuple(places.get(x, -1) for x in range(len(params["shape"])))
    if name == "reshape":
        return _reshaped(_shape(equation.invars[0]), _shape(equation.outvars[0]), view.axes)
    return None


def _shape(variable: Variable | Literal) -> tuple[int, ...]:
    return cast(jax.core.ShapedArray, variable.aval).shape  # all that equations read are arrays


def _reshaped(old: Sequence[int], new: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes after a reshape: of an axis that is cut, for each piece; -1 where joined."""
    made, sources = [-1] * len(new), [i for i, size in enumerate(old) if size != 1]
    targets = [i for i, size in enumerate(new) if size != 1]
    while sources and targets:
        source, size = sources.pop(0), 1
        while targets and size < old[source] and old[source] % (size * new[targets[0]]) == 0:
            place = targets.pop(0)
            made[place], size = axes[source], size * new[place]
        if size != old[source]:
            return tuple(made)
    return tuple(made)
