"""Level `logits`: the two models give the same outputs."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from parity.check import bounds
from parity.check.causes import explain
from parity.check.locate import locate_forward, locate_rounding
from parity.check.metrics import error_ratio, relative_max_abs
from parity.check.session import Session
from parity.frameworks.protocols import Runner
from parity.report import Divergence
from parity.report.record import Record, Verdict, first_failed, judge

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Yield gaps in float64, and in float32 the error of each side against float64."""
    probes = session.pair.probes
    truths: dict[str, np.ndarray] = {}
    for number, (name, batch) in enumerate(probes.items()):
        flax, torch = (batch.select(r.outputs(batch)) for r in session.runs("float64"))
        truths[name] = session.truth(flax, torch)
        session.progress((number + 1) / len(probes) / 2)
        if session.impurities:
            continue
        gap, bound = relative_max_abs(flax, torch, flax), session.float64_bound
        real = np.ones(1, bool) if batch.real is None else batch.real
        padded = f"{np.count_nonzero(~real)} of {real.size} positions are padding, not compared"
        note = None if real.all() else padded
        yield judge(name, "float64", "max_abs", gap, bound, flax.size, note=note)
        flips, bound = _unequal_as_float32(flax, torch), bounds.rounded_apart(flax.size)
        note = f"{flips} of {flax.size:,} logits round to another float32" if flips else None
        name = f"{name}, unequal as float32"
        yield judge(name, "float64", "logits", flips, bound, flax.size, note=note)
    yield from session.proof_of_float64("forward")
    if "float32" not in session.dtypes:
        return
    for number, (name, batch) in enumerate(probes.items()):
        flax, torch = (batch.select(r.outputs(batch)) for r in session.runs("float32"))
        truth = truths[name]
        if len(session.impurities) < 2:  # else there is no truth to divide by
            ratio = error_ratio(flax, torch, truth)
            yield judge(name, "float32", "error_ratio", ratio, bounds.RATIO, flax.size)
        for run, output in zip(session.runs("float32"), (flax, torch), strict=True):
            gap, bound = relative_max_abs(output, truth, truth), bounds.OUTPUT_FLOAT32
            yield judge(f"{name}, {run.name}", "float32", "max_abs", gap, bound, output.size)
        session.progress(0.5 + (number + 1) / len(probes) / 2)


def _unequal_as_float32(a: np.ndarray, b: np.ndarray) -> int:
    if a.shape != b.shape:
        return max(a.size, b.size)
    return int(np.count_nonzero(a.astype(np.float32) != b.astype(np.float32)))


def locate(session: "PairSession", records: list[Record]) -> Divergence | None:
    """Return the first module whose output diverges, on the probe that failed."""
    from parity.check.causes.forward import explain_output  # it imports both frameworks

    bad = first_failed(records)
    if bad.metric == "narrow operations":
        return Divergence(bad.name, "forward", 0, bad.gap, detail=bad.note or "")
    probe = failed_probe(session, [bad])
    batch = session.pair.probes[probe]
    if bad.dtype != "float64":
        return locate_rounding(session, batch)
    found = locate_forward(session, batch)
    return found and explain(found, lambda found: explain_output(session, batch, found))


def failed_probe(session: Session[Runner, Runner], records: Iterable[Record]) -> str:
    """Return the name of the probe that failed first; of the first probe if none did."""
    failed = (record.name for record in records if record.verdict is Verdict.FAIL)
    probes = list(session.pair.probes)
    return next((name for bad in failed for name in probes if bad.startswith(name)), probes[0])
