"""Comparisons as values: metrics, records and verdicts. No asserts, and no allclose."""

import dataclasses
import enum
from collections.abc import Iterable


class Verdict(enum.StrEnum):
    """The outcome of a record, a level or a report, from best to worst."""

    PASS = "PASS"
    TIE = "TIE"  # a greedy token flipped where the float64 margin is below the measured error
    ABSTAIN = "ABSTAIN"  # could not be compared; the note says why
    BLOCKED = "BLOCKED"  # an earlier level failed
    ERROR = "ERROR"  # the comparison itself went wrong, or compared nothing
    FAIL = "FAIL"  # worse than ERROR: what was found to differ differs, whatever else happened


# Why a comparison in float64 abstains.
IMPURE = "not float64 throughout, so float32 decides, which sees less"

BAD = Verdict.ERROR, Verdict.FAIL


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts; ERROR when there is none, for nothing was compared."""
    order = list(Verdict)
    return max(verdicts, key=order.index, default=Verdict.ERROR)


@dataclasses.dataclass(frozen=True)
class Record:
    """One comparison.

    Attributes:
        name: what was compared.
        dtype: of the computation.
        metric: how value is measured.
        value: what was measured; None when nothing could be.
        bound: the largest value that passes, a constant of the level.
        noise: a measured scale to read the value against, when the level has one.
        count: elements compared.
        verdict: of this comparison.
        note: what was excluded, or why there is no value.
        where: the leaf or module that the value was found at; "" for the whole.
        step: of training or decoding that it was found at; 0 where there is none.
    """

    name: str
    dtype: str
    metric: str
    value: float | None
    bound: float | None
    count: int
    verdict: Verdict
    noise: float | None = None
    note: str | None = None
    where: str = ""
    step: int = 0


def judge(
    name: str,
    dtype: str,
    metric: str,
    value: float,
    bound: float,
    count: int,
    *,
    noise: float | None = None,
    note: str | None = None,
    where: str = "",
    step: int = 0,
) -> Record:
    """A record that passes when value <= bound. NaN fails, and nothing compared is an ERROR."""
    verdict = Verdict.PASS if value <= bound else Verdict.FAIL
    if count == 0:
        verdict, note = Verdict.ERROR, note or "nothing was compared"
    return Record(
        name, dtype, metric, float(value), bound, int(count), verdict, noise, note, where, step
    )


def abstain(name: str, reason: str) -> Record:
    """A record of what could not be compared, and why."""
    return Record(name, "float64", "none", None, None, 0, Verdict.ABSTAIN, note=reason)
