"""Find the cause of a different output by re-running flax's program with one operation changed.

What only flax's code does, such as a scale, a bias or a mask too many, is no change of torch's.
"""

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from parity.check.locate import aligned, float64_gap
from parity.check.metrics import size_of
from parity.check.pair_session import PairSession
from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.flax.program import Instead, Program, Site, grouped
from parity.report import Divergence

_SECONDS = 20.0  # spent at most
Arrays = tuple[Sequence[jax.Array], Sequence[jax.Array]]  # operands and results
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu with tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "no activation": lambda x: x,
}
_BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "max": "max", "min": "min", "pow": "**"}
_OTHER_SIGN = {"add": jnp.subtract, "sub": jnp.add, "mul": jnp.divide, "div": jnp.multiply}


def explain_by_program(session: PairSession, batch: Batch, found: Divergence) -> Divergence:
    """Return the divergence of a forward pass with its cause, if one change in flax closes it.

    The change must close it for another batch too.
    """
    flax, torch = session.runs("float64")
    wanted, start = torch.outputs(batch), time.perf_counter()
    with flax.program(batch) as program:
        if _is_met(program.outputs(), wanted):
            return found
        sites, sources = program.sites(), _sources(session, found.where)
        own = [site for site in sites if _is_own(site, sources)]
        for group in grouped(own or sites):
            for number, (words, _) in enumerate(_alternatives(group[0])):
                if time.perf_counter() - start > _SECONDS:
                    return found
                outputs = _changed(program, group, number)
                if outputs is None or not _is_met(outputs, wanted):
                    continue
                if _holds(session, group, number):
                    left = max(size_of(y - aligned(x, y)) for x, y in _pairs(outputs, wanted))
                    where = ", ".join(filter(None, (group[0].name, group[0].line)))
                    cause = f"flax matches to {left:.0e} with {words} ({where})"
                    return dataclasses.replace(found, cause=cause)
    return found


def _changed(program: Program, group: Sequence[Site], number: int) -> Outputs | None:
    """Return the outputs with one alternative at all sites of a group; None if that raises."""
    by_key: dict[tuple[int, ...], Instead] = {}
    for site in group:
        found = [instead for _, instead in _alternatives(site)]
        if number < len(found):
            by_key[site.key] = found[number]
    try:
        return program.outputs(by_key.get)
    except Exception:  # shapes that do not fit, say: then it was not that
        return None


def _holds(session: PairSession, group: Sequence[Site], number: int) -> bool:
    """Whether a change makes outputs right for another batch too."""
    flax, torch = session.runs("float64")
    batch, keys = session.pair.training_batch(1), {site.key for site in group}
    with flax.program(batch) as program:
        there = [site for site in program.sites() if site.key in keys]
        if [(x.key, x.name) for x in there] != [(x.key, x.name) for x in group]:
            return True  # the program of another length is another one
        outputs = _changed(program, there, number)
    return outputs is not None and _is_met(outputs, torch.outputs(batch))


def _pairs(a: Outputs, b: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the arrays of both outputs, by path, or the first where they share none."""
    shared = [(a[path], b[path]) for path in a if path in b]
    return shared or list(zip(a.values(), b.values(), strict=False))[:1]


def _is_met(found: Outputs, wanted: Outputs) -> bool:
    pairs = _pairs(found, wanted)
    return bool(pairs) and all(float64_gap(y, x) is None for x, y in pairs)


def _sources(session: PairSession, where: str) -> list[tuple[str, range]]:
    """Return files and lines of the classes of the divergent module."""
    path = "" if where == session.model_name else where
    port = session.runs("float64")[0].module
    for flax_path, torch_path in session.modules.items():
        if torch_path == path:
            for name in filter(None, flax_path.split(".")):
                port = cast(Any, port)[int(name)] if name.isdecimal() else getattr(port, name)
            break
    found = []
    for kind in type(port).__mro__:
        try:
            file, (lines, first) = inspect.getfile(kind), inspect.getsourcelines(kind)
        except (OSError, TypeError):
            continue
        if "site-packages" not in file:
            found.append((file, range(first, first + len(lines))))
    return found


def _is_own(site: Site, sources: Sequence[tuple[str, range]]) -> bool:
    return any(file == f and line in lines for file, line in site.frames for f, lines in sources)


def _alternatives(site: Site) -> Iterator[tuple[str, Instead]]:
    """Yield other things to do in place of an operation, with descriptions."""
    name, operands, results = site.name, *cast(Arrays, (site.operands, site.results))
    if len(results) != 1 or not operands:
        return
    shape, dtype = np.shape(results[0]), getattr(results[0], "dtype", None)
    # Which operands can stand for the result.
    alike = [np.shape(x) == shape and getattr(x, "dtype", None) == dtype for x in operands]
    if name in _BINARY and len(operands) == 2:
        for place, letter in enumerate("xy"):
            if alike[place]:
                words = f"{letter} in place of x {_BINARY[name]} y"
                yield words, lambda *given, place=place: [given[place]]
        if name in _OTHER_SIGN:
            sign = {"add": "-", "sub": "+", "mul": "/", "div": "*"}[name]
            other = _OTHER_SIGN[name]
            yield f"x {sign} y in place of x {_BINARY[name]} y", lambda x, y: [other(x, y)]
        yield from _counts(site)
    elif name in ("silu", "relu", "gelu", "tanh", "logistic", "sigmoid", "elu", "leaky_relu"):
        for words, function in _ACTIVATIONS.items():
            yield words, lambda x, *_, f=function: [f(x)]
    elif name in ("sin", "cos"):
        other = jnp.cos if name == "sin" else jnp.sin
        yield f"{other.__name__} in place of {name}", lambda x, *_: [other(x)]
    elif name in ("select_n", "_where", "where"):
        cases = operands[1:]
        for place in range(len(cases)):
            if alike[place + 1]:
                words = f"the {('first', 'second', 'third')[min(place, 2)]} case alone"
                yield words, lambda *given, place=place: [given[place + 1]]
    elif name == "concatenate" and len({np.shape(x) for x in operands}) == 1:
        axis = next(i for i, n in enumerate(shape) if n != np.shape(operands[0])[i])
        yield "parts in reverse order", lambda *x: [jnp.concatenate(x[::-1], axis)]
    elif name == "iota":
        yield "numbers + 1", lambda *given: [results[0] + 1]
    elif alike[0] and len(operands) == 1 and name not in ("convert_element_type", "copy"):
        yield f"no {name}", lambda x: [x]


def _counts(site: Site) -> Iterator[tuple[str, Instead]]:
    """Move a constant integer by one."""
    operands, results = cast(Arrays, (site.operands, site.results))
    for place, x in enumerate(operands):
        is_count = np.ndim(x) == 0 and np.issubdtype(np.asarray(x).dtype, np.integer)
        for by in (1, -1) if is_count and np.ndim(results[0]) else ():
            words = f"{int(x) + by} in place of {int(x)}"
            operation = {"max": jnp.maximum, "min": jnp.minimum, "add": jnp.add}.get(site.name)
            if operation is not None:

                def moved(*given, place=place, by=by, operation=operation):
                    return [operation(*(y + by if i == place else y for i, y in enumerate(given)))]

                yield words, moved
