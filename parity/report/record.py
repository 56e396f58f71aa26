"""One comparison as a value, and its verdict. No asserts, and no allclose."""

import dataclasses
import enum
import math
from collections.abc import Iterable
from typing import Self

from parity.system.import_target import raised

# Of a check: the one that decides, and the one that is judged by it.
DTYPES = "float64", "float32"


class Verdict(enum.StrEnum):
    """The outcome of a record, a level or a report, from best to worst."""

    PASS = "PASS"
    TIE = "TIE"  # a token flipped where the float64 margin is below the measured error
    ABSTAIN = "ABSTAIN"  # could not be compared; the note says why
    BLOCKED = "BLOCKED"  # an earlier level failed
    ERROR = "ERROR"  # the comparison itself went wrong, or compared nothing
    FAIL = "FAIL"  # worse than ERROR: a difference that was found stays one, whatever else happened


# Why a comparison in float64 abstains.
IMPURE = "not float64 throughout, so float32 decides, which sees less"

BAD = Verdict.ERROR, Verdict.FAIL


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the worst verdict; ERROR for none, because nothing was compared."""
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
        bound: the largest value that passes, a constant of `parity.check.bounds`.
        count: number of elements compared.
        verdict: of this comparison.
        noise: a measured scale to read the value against, when the level has one.
        note: what was excluded, or why there is no value.
        where: the leaf or module at which the value was found; "" for the whole.
        step: of training or decoding at which it was found; 0 where there is none.
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

    @property
    def gap(self) -> float:
        """The value; NaN when nothing could be measured."""
        return math.nan if self.value is None else self.value

    def at(self, where: str = "", step: int = 0) -> Self:
        """Return the record with the leaf or module and the step at which the value was found."""
        return dataclasses.replace(self, where=where, step=step)


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
) -> Record:
    """Return a record that passes when value <= bound.

    NaN fails, and a count of 0 is an ERROR. For the arguments see `Record`.
    """
    verdict = Verdict.PASS if value <= bound else Verdict.FAIL
    if count == 0:
        verdict, note = Verdict.ERROR, note or "nothing was compared"
    return Record(name, dtype, metric, float(value), bound, int(count), verdict, noise, note)


def abstain(name: str, reason: str) -> Record:
    """Return a record of what could not be compared, and why."""
    return Record(name, "float64", "none", None, None, 0, Verdict.ABSTAIN, note=reason)


def error(name: str, exception: Exception) -> Record:
    """Return a record of an exception: its type, its place in the user's code, and its message."""
    return Record(name, "", "ran", None, None, 0, Verdict.ERROR, note=raised(exception))


def first_failed(records: Iterable[Record]) -> Record:
    """Return the first record that failed.

    Raises:
        StopIteration: when none did.
    """
    return next(record for record in records if record.verdict is Verdict.FAIL)
