"""The two models give the same outputs."""

from collections.abc import Iterable, Iterator

import numpy as np

from parity.check.causes import explained
from parity.check.locate import locate_forward, locate_rounding
from parity.check.metrics import error_ratio, relative_max_abs
from parity.check.session import Session
from parity.report import Divergence
from parity.report.record import Record, Verdict, abstain, judge

# A correct port was measured at 4e-15 to 8e-14; the smallest planted bug at 3.7e-5.
FLOAT64, FLOAT64_LARGE, LARGE = 1e-12, 1e-11, 50_000_000
# Two float64 numbers that straddle a rounding edge of float32 become different float32 numbers. A
# gap of 1e-12 does that to one logit of size 1 in 60,000, and any run may have one by bad luck.
EXCEPTIONS_PER_LOGIT, EXCEPTIONS = 2e-5, 1
# Each framework rounds in its own order; neither is more right. Twice the 1.5 seen at worst, and
# room for small outputs.
RATIO = 4.0
FLOAT32 = 1e-4


def float64_bound(session: Session) -> float:
    """Rounding grows with width and depth."""
    return FLOAT64_LARGE if session.num_params > LARGE else FLOAT64


def records(session: Session) -> Iterator[Record]:
    """Gaps in float64; in narrower types each side's error against float64."""
    probes = session.pair.probes
    truths: dict[str, np.ndarray] = {}
    for number, (name, batch) in enumerate(probes.items()):
        flax, torch = (batch.select(r.outputs(batch)) for r in session.runs("float64"))
        truths[name] = session.truth(flax, torch)
        session.progress((number + 1) / len(probes) / 2)
        if session.impurities:
            continue
        gap = relative_max_abs(flax, torch, flax)
        note = _padding_note(batch.real)
        yield judge(name, "float64", "max_abs", gap, float64_bound(session), flax.size, note=note)
        flips = _unequal_as_float32(flax, torch)
        yield judge(
            f"{name}, unequal as float32", "float64", "logits", flips,
            EXCEPTIONS + int(EXCEPTIONS_PER_LOGIT * flax.size), flax.size,
            note=f"{flips} of {flax.size:,} logits round to another float32" if flips else None,
        )  # fmt: skip
    yield from purity(session, "forward_purity")
    if "float32" not in session.dtypes:
        return
    for number, (name, batch) in enumerate(probes.items()):
        flax, torch = (batch.select(r.outputs(batch)) for r in session.runs("float32"))
        truth = truths[name]
        if len(session.impurities) < 2:  # else there is no truth to divide by
            ratio = error_ratio(flax, torch, truth)
            yield judge(name, "float32", "error_ratio", ratio, RATIO, flax.size)
        for run, output in zip(session.runs("float32"), (flax, torch), strict=True):
            error = relative_max_abs(output, truth, truth)
            yield judge(f"{name}, {run.name}", "float32", "max_abs", error, FLOAT32, output.size)
        session.progress(0.5 + (number + 1) / len(probes) / 2)


def purity(session: Session, question: str) -> Iterator[Record]:
    """Proof that the float64 runs computed in float64."""
    if session.impurities:
        yield abstain("float64", session.weaker_claim)
        return
    for run in session.runs("float64"):
        session.make_room()
        found = getattr(run, question)(session.gradient_probe)
        culprits = ", ".join(f"{name} ({n}x)" for name, n in found.impure.items())
        yield judge(
            f"{run.name}, {question.removesuffix('_purity')} in float64", "float64",
            "narrow operations", sum(found.impure.values()), 0, found.num_operations,
            note=culprits or None,
        )  # fmt: skip


def _unequal_as_float32(a: np.ndarray, b: np.ndarray) -> int:
    if a.shape != b.shape:
        return max(a.size, b.size)
    return int(np.count_nonzero(a.astype(np.float32) != b.astype(np.float32)))


def _padding_note(real: np.ndarray | None) -> str | None:
    if real is None or real.all():
        return None
    return f"{np.count_nonzero(~real)} of {real.size} positions are padding, not compared"


def locate(session: Session, records: list[Record]) -> Divergence | None:
    """The first module whose output parts, in the probe that failed."""
    from parity.check.causes.forward import (
        explained_output,  # needs both frameworks; comparing does not
    )

    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    if bad.metric == "narrow operations":
        return Divergence(bad.name, "forward", 0, bad.value, detail=bad.note or "")
    probe = failed_probe(session, [bad])
    batch = session.pair.probes[probe]
    if bad.dtype != "float64":
        return locate_rounding(session, batch)
    found = locate_forward(session, batch)
    return found and explained(found, lambda found: explained_output(session, probe, found))


def failed_probe(session: Session, records: Iterable[Record]) -> str:
    """The name of the probe that failed first, or of the first one."""
    failed = (record.name for record in records if record.verdict is Verdict.FAIL)
    probes = list(session.pair.probes)
    return next((name for bad in failed for name in probes if bad.startswith(name)), probes[0])
