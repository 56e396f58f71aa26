"""A report as one HTML page, with plots of what the check has seen."""

import itertools
from collections.abc import Iterator
from typing import Any

from parity.report import plots
from parity.report.html import render
from parity.report.plot_data import Generation
from parity.report.record import Record, Verdict
from parity.report.report import Report
from parity.report.table import dtypes_of, number

SHOWN = 48  # of the records that did not pass

_OUTCOMES = {
    Verdict.PASS: "The same function on everything compared: {count:,} numbers.",
    Verdict.FAIL: "Not the same function.",
    Verdict.ERROR: "The check did not run to its end.",
}


def page(report: Report) -> str:
    """One page without anything from elsewhere."""
    seen = report.evidence
    parted = report.divergence
    failures = list(_failures(report))
    count = sum(level.count for level in report.levels)
    drawn: dict[str, Any] = {"modules": None, "losses": [], "generations": []}
    if seen is not None:
        drawn["losses"] = [
            (curve.dtype, plots.losses(curve)) for curve in seen.losses if curve.flax
        ]
        drawn["generations"] = [
            (shown, plots.margins(shown), list(_rows(shown)))
            for shown in seen.generations
            if any(shown.margins)
        ]
        if seen.modules is not None and seen.modules.gaps:
            guilty = parted.where if parted and parted.phase == "forward" else None
            drawn["modules"] = plots.modules(seen.modules, guilty)
    return render(
        "parity.report",
        "report.html.jinja",
        report=report,
        outcome=_OUTCOMES[report.verdict].format(count=count),
        dtypes=dtypes_of(report.levels),
        failures=failures[:SHOWN],
        hidden=len(failures) - SHOWN,
        seen=seen,
        number=number,
        **drawn,
    )


def _failures(report: Report) -> Iterator[tuple[str, Record]]:
    """What did not pass, with the names of the levels."""
    for level in report.levels:
        yield from zip(itertools.repeat(level.name), level.unpassed, strict=False)


def _rows(shown: Generation) -> Iterator[dict[str, Any]]:
    """Of each row of tokens the smallest margin, where it is, and what flipped there."""
    for row, (tokens, margins) in enumerate(zip(shown.tokens, shown.margins, strict=True)):
        smallest = plots.smallest(margins)
        flips = [
            f"{flip.name}, {flip.dtype}: token {flip.index + 1}"
            for flip in shown.flips
            if flip.row == row
        ]
        yield {
            "tokens": tokens, "smallest": smallest, "at": margins.index(smallest) + 1,
            "flips": "; ".join(flips),
        }  # fmt: skip
