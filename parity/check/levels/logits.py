"""Level `logits`: the two models give the same outputs."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from parity.check.causes import explain
from parity.check.locate import locate_forward, locate_rounding
from parity.check.outputs import Comparison
from parity.check.session import Session
from parity.frameworks.protocols import Runner
from parity.pair.inputs import OTHER_SIZE
from parity.report import Divergence
from parity.report.record import Record, Verdict, first_failed

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession

_EXCHANGED = (
    "the two models are equal with {}. One uses these weights under each other's names; rename "
    "them there, or write these lines in a rules file if that is meant"
)


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Yield gaps in float64, and in float32 the error of each side against float64."""
    calls = [Comparison(session, *named) for named in session.pair.probes.items()]
    for number, call in enumerate(calls):
        yield from map(_of_given_size, call.in_float64())
        session.progress((number + 1) / len(calls) / 2)
    for name, other in session.companions.items():
        for probe, batch in other.pair.probes.items():
            found = Comparison(other, f"{name}: {probe}", batch).in_float64()
            yield from (
                dataclasses.replace(x, note=None) if x.verdict is Verdict.PASS else x for x in found
            )
    yield from session.proof_of_float64("forward")
    if "float32" not in session.dtypes:
        return
    # Where float64 agrees for another batch size, so do narrower types.
    given = [
        x
        for x, name in zip(calls, session.pair.probes, strict=True)
        if not name.endswith(OTHER_SIZE)
    ]
    for number, call in enumerate(given):
        yield from call.in_float32()
        session.progress(0.5 + (number + 1) / len(given) / 2)
    if (half := session.pair.half) is not None:
        for call in given:
            yield from call.in_half(half)


def _of_given_size(record: Record) -> Record:
    """Return a record; none fails because a module has its number of rows fixed."""
    is_other = OTHER_SIZE in record.name and record.metric == "max_abs"
    if record.verdict is not Verdict.FAIL or not is_other or record.gap != math.inf:
        return record
    note = f"{record.note}: a number of rows is fixed, and another one is not compared"
    return dataclasses.replace(record, verdict=Verdict.ABSTAIN, note=note)


def locate(session: "PairSession", records: list[Record]) -> Divergence | None:
    """Return the first module whose output diverges, on the probe that failed."""
    from parity.check.causes.forward import explain_output  # it imports both frameworks

    bad = first_failed(records)
    for name, other in session.companions.items():
        if bad.name.startswith(f"{name}: "):
            own = dataclasses.replace(bad, name=bad.name.removeprefix(f"{name}: "))
            found = locate(other, [own])
            words = f"In the model with {name}."
            return found and dataclasses.replace(found, detail=f"{words} {found.detail}".rstrip())
    if bad.metric == "narrow operations":
        return Divergence(bad.name, "forward", 0, bad.gap, detail=bad.note or "")
    probe = failed_probe(session, [bad])
    batch = session.pair.probes[probe]
    if bad.dtype != "float64":
        return locate_rounding(session, batch)
    found = locate_forward(session, batch)
    if found is None:  # not in an output that is passed on from module to module
        where = f"output {bad.where}" if bad.where else session.model_name
        return Divergence(where, "forward", 0, bad.gap, detail=bad.note or "")
    if bad.where:
        found = dataclasses.replace(found, detail=f"{found.detail} Seen in output {bad.where}.")
    if lines := session.pair.rules.exchange:
        return dataclasses.replace(found, cause=_EXCHANGED.format(lines))
    return explain(found, lambda found: explain_output(session, batch, found))


def failed_probe(session: Session[Runner, Runner], records: Iterable[Record]) -> str:
    """Return the name of the probe that failed first; of the first probe if none did."""
    failed = (record.name for record in records if record.verdict is Verdict.FAIL)
    probes = list(session.pair.probes)
    longest = sorted(probes, key=len, reverse=True)  # some begin as others are called
    return next((name for bad in failed for name in longest if bad.startswith(name)), probes[0])
