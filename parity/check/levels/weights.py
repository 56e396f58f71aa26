"""Level `weights`: every leaf is used once, keeps its bits both ways, and is oriented right."""

from collections.abc import Iterator

import numpy as np

from parity.check import bounds
from parity.check.levels.completeness import every_leaf_once
from parity.check.metrics import different_bits, max_abs
from parity.check.pair_session import PairSession
from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.torch.leaves import load_torch, torch_leaves
from parity.report import Divergence
from parity.report.record import Record, Verdict, first_failed, judge
from parity.weights import known_layers as layers
from parity.weights.layouts import Layout, Link, join

_DIFFERENT = "different numbers"
_TABLE = "max_abs of the largest"


def records(session: PairSession) -> Iterator[Record]:
    """Check that the map is complete, round trips are bitwise, and matrices act as their twins."""
    first = every_leaf_once(session)
    yield first
    if first.verdict is not Verdict.PASS:
        return
    session.progress(0.2)
    yield from _integers(session)
    for table in session.tables:
        title = f"numbers of {', '.join(table.torch)} are those of {', '.join(table.flax)}"
        size = sum(leaf.size for leaf in table.flax.values())
        made = judge(title, "float32", _TABLE, table.gap, table.bound, size)
        yield made.at(next(iter(table.torch)))
    yield from _round_trips(session)
    session.progress(0.5)
    yield from _orientations(session)


def _integers(session: PairSession) -> Iterator[Record]:
    """Compare the integers that both models were built with: tables, which no weights replace."""
    if session.pair.leaves is not None:
        return
    ours = torch_leaves(session.pair.torch.build("float32"))
    for link in session.weight_map.links:
        flax = {name: session.flax_leaves[name] for name in link.flax}
        if all(leaf.dtype.kind in "iub" for leaf in flax.values()):
            made = link.to_torch(flax, session.weight_map.torch_shapes)
            different = sum(int(np.sum(ours[name] != leaf)) for name, leaf in made.items())
            size, name = sum(leaf.size for leaf in made.values()), ", ".join(link.torch)
            title = f"integers of {name} are those of {', '.join(link.flax)}"
            made_record = judge(title, "float32", _DIFFERENT, different, 0, size)
            yield made_record.at(link.torch[0])


def _round_trips(session: PairSession) -> Iterator[Record]:
    """Move the weights through the models themselves, in both directions."""
    flax_model, torch_model = session.build_flax(), session.pair.torch.build("float32")
    start = session.flax_leaves
    load_torch(torch_model, session.torch_leaves)
    there = torch_leaves(torch_model)
    apart = [x for x in session.tables if x.gap > x.bound]  # each model has its own
    own = {name for table in apart for name in (*table.flax, *table.torch)}
    kept = {name: start[name] for name in (*session.weight_map.flax_ignored, *own) if name in start}
    with jax_scope("float32", session.devices.flax):
        load_flax(flax_model, session.weight_map.to_flax(there) | kept)
    back = flax_leaves(flax_model)
    bits = sum(different_bits(start[name], back[name]) for name in start)
    size = sum(leaf.size for leaf in start.values())
    yield judge("flax to torch to flax", "float32", "different bits", bits, 0, size)
    again = session.weight_map.to_torch(back)
    bits = sum(different_bits(there[name], leaf) for name, leaf in again.items() if name not in own)
    size = sum(leaf.size for leaf in again.values())
    yield judge("torch to flax to torch", "float32", "different bits", bits, 0, size)


def _orientations(session: PairSession) -> Iterator[Record]:
    """Run both owners of each matrix on one input: shapes cannot tell W from its transpose."""
    flax_run, torch_run = session.runs("float64")
    rng = np.random.default_rng(0)
    unknown = []
    for link in session.weight_map.links:
        ours = [layers.torch_owner(torch_run.module, name) for name in link.torch]
        theirs = [layers.flax_owner(flax_run.module, name) for name in link.flax]
        torch_acts = [act for owner in ours if (act := layers.torch_action(*owner)) is not None]
        flax_acts = [act for owner in theirs if (act := layers.flax_action(*owner)) is not None]
        names = ", ".join(link.torch)
        if (
            len(torch_acts) < len(ours)
            or len(flax_acts) < len(theirs)
            or link.layout not in set(Layout)
            or not layers.are_one_kind(ours[0][0], theirs[0][0])
        ):
            if _fits_transposed(session.flax_leaves[link.flax[0]].shape):
                unknown.append(names)
            continue
        if link.flax[0].endswith("bias"):
            continue
        x = layers.flax_input(theirs[0][0], rng)
        try:
            with jax_scope("float64", session.devices.flax):
                flax_output = _linear_part(flax_acts, x, link.heads)
            torch_output = _linear_part(torch_acts, x, link.heads)
        except Exception:  # a subclass may want other inputs
            unknown.append(names)
            continue
        name, noise = f"{names} acts as {', '.join(link.flax)}", _transposed_gap(session, link, x)
        gap, bound, size = max_abs(torch_output, flax_output), bounds.ORIENTATION, flax_output.size
        yield judge(name, "float64", "max_abs", gap, bound, size, noise=noise).at(link.torch[0])
    if unknown:
        note = "no way known to run these modules alone"
        name, verdict = f"orientation of {', '.join(unknown)}", Verdict.ABSTAIN
        yield Record(name, "float64", "max_abs", None, None, 0, verdict, note=note)


def _fits_transposed(shape: tuple[int, ...]) -> bool:
    """Whether a matrix would still fit with two of its axes swapped."""
    return len(shape) >= 2 and len(set(shape)) < len(shape)


def _linear_part(acts: list[layers.Act], x: np.ndarray, heads: int) -> np.ndarray:
    """Return outputs joined as fused leaves are; without biases, which have their own links."""
    outputs = [act(x) if x.ndim == 1 else act(x) - act(np.zeros_like(x)) for act in acts]
    return join(outputs, heads)


def _transposed_gap(session: PairSession, link: Link, x: np.ndarray) -> float | None:
    """Return the gap that a square kernel would have shown if transposed; None for others."""
    kernel = session.flax_leaves[link.flax[0]]
    if len(link.flax) > 1 or x.ndim != 2 or kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        return None
    wide = kernel.astype(np.float64)
    return max_abs(x @ wide, x @ wide.T)


def locate(session: PairSession, records: list[Record]) -> Divergence | None:
    """Return the leaf whose comparison failed."""
    bad = first_failed(records)
    if not bad.where:
        problem, _, more = (bad.note or "").partition("; ")
        return Divergence("the weight map", "weights", 0, bad.gap, problem or None, more)
    if bad.metric == _DIFFERENT:
        cause = f"{bad.gap:.0f} of {bad.count} integers of the two tables differ"
        return Divergence(bad.where, "weights", 0, bad.gap, cause)
    if bad.metric == _TABLE:
        cause = f"the two models were built with other numbers there, up to {bad.gap:.0e} apart"
        return Divergence(bad.where, "weights", 0, bad.gap, cause)
    return Divergence(bad.where, "weights", 0, bad.gap, _orientation(session, bad.where))


def _orientation(session: PairSession, name: str) -> str | None:
    """Describe that a matrix acts as its counterpart once it is transposed; None if it does not."""
    flax_run, _ = session.runs("float64")
    link = next(link for link in session.weight_map.links if name in link.torch)
    weight = session.torch_leaves[name].astype(np.float64)
    owner, leaf = layers.flax_owner(flax_run.module, link.flax[0])
    act = layers.flax_action(owner, leaf)
    x = layers.flax_input(owner, np.random.default_rng(0))
    if act is None or len(link.flax) * len(link.torch) > 1 or x.ndim != 2 or weight.ndim != 2:
        return None
    with jax_scope("float64", session.devices.flax):
        flax_output = _linear_part([act], x, 1)
    for tried in (weight, weight.T):
        if tried.shape[0] == x.shape[1] and max_abs(x @ tried, flax_output) <= bounds.ORIENTATION:
            return f"{name} lies the other way round in {link.flax[0]} than as {link.layout}"
    return None
