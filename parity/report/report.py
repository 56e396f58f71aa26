"""A whole check as a value: prints as a table, converts to JSON, decides the exit code."""

import dataclasses
import io
from collections.abc import Mapping

from rich.console import Console, RenderableType

from parity.report import table
from parity.report.json import to_json
from parity.report.level import Divergence, Level
from parity.report.plot_data import PlotData
from parity.report.record import BAD, IMPURE, Verdict, worst


class ParityError(AssertionError):
    """Two models are not the same function, or it could not be found out.

    Attributes:
        report: the report of the check.
    """

    def __init__(self, report: "Report"):
        self.report = report
        super().__init__(f"{report.summary}\n\n{report}")


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole check; `parity.report.page.page` renders it as HTML.

    Attributes:
        environment: versions, devices and settings.
        subject: names, sizes and settings of the pair.
        levels: in the order in which they ran.
        divergence: where the two models first diverge, if they do.
        plot_data: numbers for the plots of a page, if they were asked for.
    """

    environment: Mapping[str, object]
    subject: Mapping[str, object]
    levels: tuple[Level, ...]
    divergence: Divergence | None = None
    plot_data: PlotData | None = None

    @property
    def verdict(self) -> Verdict:
        """PASS unless a level failed, raised, or compared nothing."""
        found = worst(level.verdict for level in self.levels if not level.blocked)
        if found in BAD:
            return found
        return Verdict.PASS if any(level.count for level in self.levels) else Verdict.ERROR

    @property
    def ok(self) -> bool:
        """Whether the check ran and found no difference."""
        return self.verdict is Verdict.PASS

    def raise_if_diverged(self) -> None:
        """Raise unless the check passed.

        Raises:
            ParityError: with the whole report as its message.
        """
        __tracebackhide__ = True  # pytest shows the test's line, not this one
        if not self.ok:
            raise ParityError(self)

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=100, file=text, color_system=None).print(self)
        return text.getvalue()

    @property
    def exit_code(self) -> int:
        """0 the same function, 1 they differ, 2 the check itself went wrong."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1}.get(self.verdict, 2)

    @property
    def summary(self) -> str:
        """The outcome in a line."""
        return f"{self.verdict}: {self.divergence or self._outcome}"

    @property
    def _outcome(self) -> str:
        if self.verdict is Verdict.FAIL:
            return "not the same function."
        if self.verdict is Verdict.ERROR:
            return "the check did not run to its end."
        notes = (record.note or "" for level in self.levels for record in level.records)
        if any(note.startswith(IMPURE) for note in notes):
            return "no difference beyond the rounding of float32. A smaller one would not be seen."
        return "the same function on everything compared."

    def to_json(self) -> str:
        """Return the report in schema 1; numbers that JSON cannot hold are text."""
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
            "evidence": dataclasses.asdict(self.plot_data) if self.plot_data else None,
        }
        return to_json(document)

    def to_markdown(self) -> str:
        """Return the table of the levels for a README, each value with its bound in brackets."""
        return table.markdown(self.levels)

    def __rich__(self) -> RenderableType:
        """Return a table with one row per level: what was measured against what is allowed."""
        return table.terminal(self.levels, self.verdict, self.summary)
