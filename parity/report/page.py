"""A report as one HTML page with plots."""

from collections.abc import Iterator, Mapping

from parity.report import plots
from parity.report.html import render
from parity.report.plot_data import Generation
from parity.report.record import Verdict
from parity.report.report import Report
from parity.report.table import dtypes_of, number

SHOWN = 48  # of the records that did not pass

_OUTCOMES = {
    Verdict.PASS: "The same function on everything compared: {count:,} numbers.",
    Verdict.FAIL: "Not the same function.",
    Verdict.ERROR: "The check did not run to its end.",
}


def page(report: Report) -> str:
    """Return a report as one HTML file that loads nothing, with plots if it has plot data."""
    seen, divergence = report.plot_data, report.divergence
    failures = [(level.name, record) for level in report.levels for record in level.unpassed]
    modules, losses, generations = None, [], []
    marked = divergence.where if divergence and divergence.phase == "forward" else None
    if seen is not None:
        losses = [(curve.dtype, plots.losses(curve)) for curve in seen.losses if curve.flax]
        generations = [
            (shown, plots.margins(shown), list(_rows(shown)))
            for shown in seen.generations
            if any(shown.margins)
        ]
        if seen.modules is not None and seen.modules.gaps:
            modules = plots.modules(seen.modules, marked)
    count = sum(level.count for level in report.levels)
    plotted = {"seen": seen, "modules": modules, "losses": losses, "generations": generations}
    return render(
        "parity.report",
        "report.html.jinja",
        report=report,
        outcome=_OUTCOMES[report.verdict].format(count=count),
        dtypes=dtypes_of(report.levels),
        failures=failures[:SHOWN],
        hidden=len(failures) - SHOWN,
        number=number,
        **plotted,
    )


def _rows(shown: Generation) -> Iterator[Mapping[str, object]]:
    """Yield of each row its tokens, its smallest margin, where that is, and what flipped."""
    for row, (tokens, margins) in enumerate(zip(shown.tokens, shown.margins, strict=True)):
        smallest = plots.smallest(margins)
        flips = (x for x in shown.flips if x.row == row)
        words = "; ".join(f"{x.name}, {x.dtype}: token {x.index + 1}" for x in flips)
        at = margins.index(smallest) + 1
        yield {"tokens": tokens, "smallest": smallest, "at": at, "flips": words}
