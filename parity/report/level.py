"""A level of the check, and the place where two models first diverge."""

import dataclasses

from parity.report.record import Record, Verdict, worst


@dataclasses.dataclass(frozen=True)
class Level:
    """One level of the check and everything it compared."""

    name: str
    seconds: float
    records: tuple[Record, ...]
    blocked: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of its records."""
        return Verdict.BLOCKED if self.blocked else worst(r.verdict for r in self.records)

    @property
    def count(self) -> int:
        """Number of elements compared."""
        return sum(record.count for record in self.records)

    @property
    def unpassed(self) -> tuple[Record, ...]:
        """The records that did not pass."""
        return tuple(record for record in self.records if record.verdict is not Verdict.PASS)

    @property
    def excluded(self) -> tuple[str, ...]:
        """Notes of passing records, such as what was left out, each once."""
        passed = (record for record in self.records if record.verdict is Verdict.PASS)
        return tuple(dict.fromkeys(record.note for record in passed if record.note))

    def headline(self, dtype: str) -> Record | None:
        """Return the record to show: the first that did not pass, or the closest to its bound.

        None when nothing was compared in this dtype.
        """
        records = [record for record in self.records if record.dtype == dtype]
        if not records:
            return None
        bad = [record for record in records if record.verdict is not Verdict.PASS]
        alike = [record for record in records if record.metric == records[0].metric]
        return bad[0] if bad else max(alike, key=lambda r: r.gap / r.bound if r.bound else 0.0)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two models first diverge.

    Attributes:
        where: path of the divergent module or leaf, or the name of the model itself.
        phase: weights, forward, backward, optimizer or decode.
        step: of training or decoding; 0 where there is none.
        value: the gap there.
        cause: why, where it was found.
        detail: a sentence on what was seen around it.
    """

    where: str
    phase: str
    step: int
    value: float
    cause: str | None = None
    detail: str = ""

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step else ""
        cause = f" Cause: {self.cause}." if self.cause else ""
        return (
            f"first differs at {self.where} ({self.phase}{step}), gap {self.value:.1e}. "
            f"{self.detail}{cause}".rstrip()
        )
