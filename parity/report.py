"""The outcome of a check as a value: prints as a table, goes to JSON, decides the exit code."""

import dataclasses
import json
import math
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.compare import BAD, Record, Verdict, worst

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.TIE: "yellow",
    Verdict.ABSTAIN: "yellow",
    Verdict.BLOCKED: "dim",
    Verdict.FAIL: "bold red",
    Verdict.ERROR: "bold red",
}


@dataclasses.dataclass(frozen=True)
class Level:
    """One rung of the check and everything it compared."""

    name: str
    seconds: float
    records: tuple[Record, ...]
    blocked: bool = False

    @property
    def verdict(self) -> Verdict:
        """The worst of its records."""
        return Verdict.BLOCKED if self.blocked else worst(r.verdict for r in self.records)

    def headline(self, dtype: str) -> Record | None:
        """The record to show: the first that did not pass, or the closest to the first's bound."""
        records = [record for record in self.records if record.dtype == dtype]
        if not records:
            return None
        bad = [record for record in records if record.verdict is not Verdict.PASS]
        alike = [record for record in records if record.metric == records[0].metric]
        return bad[0] if bad else max(alike, key=lambda r: r.value / r.bound if r.bound else 0.0)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two models part.

    Attributes:
        where: path of the guilty module or leaf, or the name of the model itself.
        phase: weights, forward, backward, optimizer or decode.
        step: of training or decoding; 0 where there is none.
        value: the gap there.
        cause: why, where it is known.
        detail: what was seen around it, in words.
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


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole check."""

    environment: dict[str, Any]
    subject: dict[str, Any]
    levels: tuple[Level, ...]
    divergence: Divergence | None = None

    @property
    def verdict(self) -> Verdict:
        """PASS unless a level failed, went wrong, or compared nothing."""
        found = worst(level.verdict for level in self.levels if not level.blocked)
        if found in BAD:
            return found
        compared = any(record.count for level in self.levels for record in level.records)
        return Verdict.PASS if compared else Verdict.ERROR

    @property
    def exit_code(self) -> int:
        """0 the same function, 1 diverged, 2 the check itself went wrong."""
        return {Verdict.PASS: 0, Verdict.FAIL: 1}.get(self.verdict, 2)

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
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The table of the levels for a README: each value with its bound in brackets."""
        rows = ["| level | float64 | float32 | compared | verdict |", "|---|---|---|---|---|"]
        for level in self.levels:
            heads = [level.headline(dtype) for dtype in ("float64", "float32")]
            cells = " | ".join("" if head is None else _measured(head) for head in heads)
            compared = sum(record.count for record in level.records)
            rows.append(f"| {level.name} | {cells} | {compared:,} | {level.verdict} |")
        return "\n".join(rows) + "\n"

    def __rich__(self) -> RenderableType:
        """One row per level, in each dtype: what was measured against what is allowed."""
        dtypes = [
            dtype
            for dtype in ("float64", "float32")
            if any(level.headline(dtype) for level in self.levels)
        ]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("level")
        for dtype in dtypes:
            table.add_column(dtype)
        table.add_column("compared", justify="right")
        table.add_column("verdict")
        table.add_column("seconds", justify="right")
        for level in self.levels:
            compared = sum(record.count for record in level.records)
            table.add_row(
                level.name,
                *(_cell(level.headline(dtype)) for dtype in dtypes),
                f"{compared:,}" if compared else "",
                Text(level.verdict, style=_COLOURS[level.verdict]),
                f"{level.seconds:.1f}" if not level.blocked else "",
            )
        return Group(table, *self._notes(), Text(self._summary(), style=_COLOURS[self.verdict]))

    def _notes(self) -> list[Text]:
        notes = []
        for level in self.levels:
            for record in level.records:
                if record.verdict is not Verdict.PASS:
                    value = "" if record.value is None else f" {record.value:.3g}"
                    bound = "" if record.bound is None else f" > {record.bound:.0e}"
                    text = f"{level.name}: {record.name}, {record.dtype}, {record.metric}"
                    text += f" at {record.where}" if record.where else ""
                    text += value + bound
                    text += f" ({record.note})" if record.note else ""
                    notes.append(Text(text, style=_COLOURS[record.verdict]))
        hidden = len(notes) - 5
        if hidden > 0:
            notes = [*notes[:5], Text(f"... and {hidden} more records, see --json", style="dim")]
        excluded = dict.fromkeys(
            f"{level.name}: {record.note}"
            for level in self.levels
            for record in level.records
            if record.note and record.verdict is Verdict.PASS
        )
        return notes + [Text(text, style="dim") for text in excluded]

    def _summary(self) -> str:
        if self.divergence:
            return f"{self.verdict}: {self.divergence}"
        return (
            f"{self.verdict}: "
            + {
                Verdict.PASS: "the same function on everything compared.",
                Verdict.FAIL: "not the same function.",
                Verdict.ERROR: "the check did not run to its end.",
            }[self.verdict]
        )


def _cell(record: Record | None) -> Text:
    """A measurement, its bound, and below them how it is measured."""
    if record is None or record.value is None:
        return Text("")
    sign = "<=" if record.verdict is Verdict.PASS else "> "
    bound = "" if record.bound is None else f" {sign} {_number(record.bound)}"
    return Text.assemble(
        _number(record.value), bound, "\n", (record.metric.replace("_", " "), "dim")
    )


def _measured(record: Record) -> str:
    """A measurement in one line, its bound in brackets."""
    if record.value is None:
        return ""
    return f"{record.metric.replace('_', ' ')} {_number(record.value)} ({_number(record.bound)})"


def _number(value: float) -> str:
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.1e}".replace(".0e", "e")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
