"""A forward pass of a Flax module as a jaxpr that can be run again with operations changed."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax._src import source_info_util

from parity.frameworks.batch import Outputs, output_leaves

Jaxpr = jax.extend.core.Jaxpr
Literal = jax.extend.core.Literal
Variable = jax.extend.core.Var
Equation = jax.extend.core.JaxprEqn
# Values of an equation's operands to those of its results.
Instead = Callable[..., Sequence[object]]
# Longer loops run as they are, without changes inside.
_LONGEST_LOOP = 64
_PARITY = str(Path(__file__).parents[2]) + os.sep
_BODIES = "jaxpr", "call_jaxpr"
_CALLED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One operation of a program, or one call of a jitted function; those in loops count once.

    Attributes:
        key: places of the equations that lead to it.
        name: of the operation or function.
        line: file and line of the user's code that asked for it; "" where there is none.
        frames: files and lines of all the user's code on the way to it.
        operands: its inputs, where it ran first.
        results: its outputs.
    """

    key: tuple[int, ...]
    name: str
    line: str
    frames: tuple[tuple[str, int], ...]
    operands: Sequence[object]
    results: Sequence[object]


Change = Callable[[tuple[int, ...]], Instead | None]


class Program:
    """The jaxpr of a call of a module."""

    def __init__(self, module: nnx.Module, call: Callable[[nnx.Module], object]):
        graphdef, state = nnx.split(module)
        self._leaves, tree = jax.tree.flatten(state)
        self._paths: list[str] = []

        def run(leaves: Sequence[jax.Array]) -> list[object]:
            output = call(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)))
            arrays = {path: x for path, x in output_leaves(output) if isinstance(x, jax.Array)}
            self._paths = list(arrays)
            return list(arrays.values())

        self._jaxpr = jax.make_jaxpr(run)(self._leaves)

    def outputs(self, change: Change | None = None) -> Outputs:
        """Return the arrays of the output by path, with operations changed."""
        run = _Run(change or (lambda key: None))
        values = run.results(self._jaxpr.jaxpr, self._jaxpr.consts, self._leaves)
        return dict(zip(self._paths, map(np.asarray, values), strict=True))

    def sites(self) -> list[Site]:
        """Run the program and return its operations, in order."""
        run = _Run(lambda key: None)
        run.results(self._jaxpr.jaxpr, self._jaxpr.consts, self._leaves)
        return list(run.seen.values())


class _Run:
    """One run of a program, operation by operation."""

    def __init__(self, change: Change):
        self._change = change
        self.seen: dict[tuple[int, ...], Site] = {}

    def results(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[object],
        given: Sequence[object],
        within: tuple[int, ...] = (),
        caller: Equation | None = None,
    ) -> list[object]:
        """Return what a jaxpr computes."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))

        def read(x: object) -> object:
            return x.val if isinstance(x, Literal) else values[cast(Variable, x)]

        for number, equation in enumerate(jaxpr.eqns):
            key, operands = (*within, number), [read(x) for x in equation.invars]
            # What a jitted function does is kept, with the lines of its first caller.
            outer = caller or equation
            instead = self._change(key)
            found = (
                list(instead(*operands)) if instead else self._run(equation, operands, key, outer)
            )
            if key not in self.seen:
                name = str(equation.params.get("name") or equation.primitive.name)
                self.seen[key] = Site(key, name, *_lines(outer), operands, found)
            values |= zip(equation.outvars, found, strict=True)
        return [read(x) for x in jaxpr.outvars]

    def _run(
        self, equation: Equation, operands: list[object], key: tuple[int, ...], caller: Equation
    ) -> list[object]:
        name, params = equation.primitive.name, equation.params
        body = next((params[x] for x in _BODIES if x in params), None)
        if name in _CALLED or name.startswith(("custom_jvp_call", "custom_vjp_call")):
            inner, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
            assert inner is not None, f"{name} has no body"
            return self.results(inner, consts, operands, key, caller)
        if name == "scan" and params["length"] <= _LONGEST_LOOP:
            return self._loop(params, operands, key, caller)
        found = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
        return list(found) if equation.primitive.multiple_results else [found]

    def _loop(
        self, params: dict, operands: list[object], key: tuple[int, ...], caller: Equation
    ) -> list[object]:
        body, start = params["jaxpr"], params["num_consts"]
        end = start + params["num_carry"]
        fixed, state = operands[:start], operands[start:end]
        rows = [cast(jax.Array, x) for x in operands[end:]]
        steps = range(params["length"])
        collected: list[list[object]] = []
        for step in reversed(steps) if params["reverse"] else steps:
            given = [*fixed, *state, *(x[step] for x in rows)]
            found = self.results(body.jaxpr, body.consts, given, key, caller)
            state, made = found[: end - start], found[end - start :]
            collected.append(made)
        if params["reverse"]:
            collected.reverse()
        return [*state, *(jnp.stack(x) for x in zip(*collected, strict=True))]


def _lines(equation: Equation) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Return the user's line that asked for an equation, and all frames of the user's code."""
    found = source_info_util.user_frames(equation.source_info.traceback)
    frames = tuple((x.file_name, x.start_line) for x in found if _is_users(x.file_name))
    line = f"{frames[0][0].rpartition('/')[2]}:{frames[0][1]}" if frames else ""
    return line, frames


def _is_users(file: str) -> bool:
    return "site-packages" not in file and not file.startswith(_PARITY)


def grouped(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Yield the sites of one operation in one line, then each of several alone."""
    lines: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        lines.setdefault((site.name, site.line), []).append(site)
    yield from lines.values()
    for group in lines.values():
        yield from ([site] for site in group if len(group) > 1)
