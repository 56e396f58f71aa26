"""The levels as a table, for a terminal and in markdown."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.report.level import Level
from parity.report.record import DTYPES, Record, Verdict

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.TIE: "yellow",
    Verdict.ABSTAIN: "yellow",
    Verdict.BLOCKED: "dim",
    Verdict.FAIL: "bold red",
    Verdict.ERROR: "bold red",
}


def markdown(levels: Sequence[Level]) -> str:
    """Return a markdown table with one row per level: each value with its bound in brackets."""
    rows = ["| level | float64 | float32 | compared | verdict |", "|---|---|---|---|---|"]
    for level in levels:
        heads = [level.headline(dtype) for dtype in DTYPES]
        cells = " | ".join("" if head is None else _measured(head) for head in heads)
        rows.append(f"| {level.name} | {cells} | {level.count:,} | {level.verdict} |")
    return "\n".join(rows) + "\n"


def terminal(levels: Sequence[Level], verdict: Verdict, summary: str) -> RenderableType:
    """Return a table of the levels, then what did not pass, what was excluded, and the outcome."""
    dtypes = dtypes_of(levels)
    table = Table("level", *dtypes, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("compared", justify="right")
    table.add_column("verdict")
    table.add_column("seconds", justify="right")
    for level in levels:
        table.add_row(
            level.name,
            *(_cell(level.headline(dtype)) for dtype in dtypes),
            f"{level.count:,}" if level.count else "",
            Text(level.verdict, style=_COLOURS[level.verdict]),
            f"{level.seconds:.1f}" if not level.blocked else "",
        )
    return Group(table, *_notes(levels), Text(summary, style=_COLOURS[verdict]))


def dtypes_of(levels: Sequence[Level]) -> list[str]:
    """Return the dtypes in which anything was compared."""
    return [dtype for dtype in DTYPES if any(level.headline(dtype) for level in levels)]


def number(value: float) -> str:
    """Format a number in a few characters."""
    if value == 0 or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 else f"{value:.1e}".replace(".0e", "e")


def _notes(levels: Sequence[Level]) -> list[Text]:
    notes = []
    for level in levels:
        for record in level.unpassed:
            value = "" if record.value is None else f" {record.value:.3g}"
            bound = "" if record.bound is None else f" > {record.bound:.0e}"
            where = f" at {record.where}" if record.where else ""
            note = f" ({record.note})" if record.note else ""
            text = f"{level.name}: {record.name}, {record.dtype}, {record.metric}{where}"
            notes.append(Text(text + value + bound + note, style=_COLOURS[record.verdict]))
    hidden = len(notes) - 5
    if hidden > 0:
        notes = [*notes[:5], Text(f"... and {hidden} more records, see --json", style="dim")]
    excluded = (f"{level.name}: {note}" for level in levels for note in level.excluded)
    return notes + [Text(text, style="dim") for text in excluded]


def _cell(record: Record | None) -> Text:
    """Format a measurement and its bound, and below them the metric."""
    if record is None or record.value is None:
        return Text("")
    sign = "<=" if record.verdict is Verdict.PASS else "> "
    bound = "" if record.bound is None else f" {sign} {number(record.bound)}"
    metric = record.metric.replace("_", " "), "dim"
    return Text.assemble(number(record.value), bound, "\n", metric)


def _measured(record: Record) -> str:
    """Format a measurement in one line, with its bound in brackets."""
    if record.value is None or record.bound is None:
        return ""
    return f"{record.metric.replace('_', ' ')} {number(record.value)} ({number(record.bound)})"
