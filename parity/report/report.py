"""A whole check as a value: prints as a table, goes to JSON or a page, decides the exit code."""

import dataclasses
import io
import json
import math
from typing import Any

from rich.console import Console, RenderableType

from parity.report import table
from parity.report.level import Divergence, Level
from parity.report.plot_data import PlotData
from parity.report.record import BAD, IMPURE, Verdict, worst


class ParityError(AssertionError):
    """Two models are not the same function, or it could not be found out.

    Attributes:
        report: what was seen.
    """

    def __init__(self, report: "Report"):
        self.report = report
        super().__init__(f"{report.summary}\n\n{report}")


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole check.

    Attributes:
        environment: where it ran.
        subject: the names, sizes and settings of the pair.
        levels: in the order they were climbed.
        divergence: where the two models part, when they do.
        evidence: the numbers behind the plots of a page, when they were asked for.
    """

    environment: dict[str, Any]
    subject: dict[str, Any]
    levels: tuple[Level, ...]
    divergence: Divergence | None = None
    evidence: PlotData | None = None

    @property
    def verdict(self) -> Verdict:
        """PASS unless a level failed, went wrong, or compared nothing."""
        found = worst(level.verdict for level in self.levels if not level.blocked)
        if found in BAD:
            return found
        return Verdict.PASS if any(level.count for level in self.levels) else Verdict.ERROR

    @property
    def ok(self) -> bool:
        """Whether the check ran and found no difference."""
        return self.verdict is Verdict.PASS

    def raise_if_diverged(self) -> None:
        """Raises ParityError, with the report as its message, unless the check passed."""
        __tracebackhide__ = True  # pytest shows the test's line, not this one
        if not self.ok:
            raise ParityError(self)

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO(), color_system=None)
        console.print(self)
        return console.file.getvalue()

    @property
    def exit_code(self) -> int:
        """0 the same function, 1 diverged, 2 the check itself went wrong."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1}.get(self.verdict, 2)

    @property
    def _claim(self) -> str:
        notes = (record.note or "" for level in self.levels for record in level.records)
        if any(note.startswith(IMPURE) for note in notes):
            return "no difference beyond the rounding of float32. A smaller one would not be seen."
        return "the same function on everything compared."

    @property
    def summary(self) -> str:
        """The outcome in a line."""
        if self.divergence:
            return f"{self.verdict}: {self.divergence}"
        return (
            f"{self.verdict}: "
            + {
                Verdict.PASS: self._claim,
                Verdict.FAIL: "not the same function.",
                Verdict.ERROR: "the check did not run to its end.",
            }[self.verdict]
        )

    def to_json(self) -> str:
        """The report in schema 1; numbers that JSON cannot hold are strings."""
        document = {
            "schema": 1,
            "verdict": self.verdict,
            "environment": self.environment,
            "subject": self.subject,
            "levels": [
                {
                    "name": level.name,
                    "verdict": level.verdict,
                    "seconds": round(level.seconds, 3),
                    "records": [dataclasses.asdict(record) for record in level.records],
                }
                for level in self.levels
            ],
            "divergence": dataclasses.asdict(self.divergence) if self.divergence else None,
            "evidence": dataclasses.asdict(self.evidence) if self.evidence else None,
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The table of the levels for a README: each value with its bound in brackets."""
        return table.markdown(self.levels)

    def to_html(self) -> str:
        """One page without anything from elsewhere, with plots where there is evidence."""
        from parity.report.page import page

        return page(self)

    def __rich__(self) -> RenderableType:
        """One row per level, in each dtype: what was measured against what is allowed."""
        return table.terminal(self.levels, self.verdict, self.summary)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
