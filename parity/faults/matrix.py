"""Ask every detector about every bug and about healthy models, and tabulate which fired."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.doctor import DETECTORS, examine, twin_model
from parity.faults.bug import GALLERY, Bug
from parity.faults.edit import FRAMEWORKS, mutated, twin
from parity.frameworks.flax.scope import drop_programs_if_many
from parity.report.figures import save
from parity.report.record import Verdict

NAMES = tuple(detector.name for detector in DETECTORS)


@dataclasses.dataclass(frozen=True)
class Row:
    """The answers of the detectors about one model.

    Attributes:
        framework: flax or torch.
        bug: its id; None for a healthy model.
        seed: of the weights and probes.
        fired: detectors that found a fault.
        asked: detectors that could answer.
        sentences: the findings of those that fired.
    """

    framework: str
    bug: str | None
    seed: int
    fired: tuple[str, ...]
    asked: tuple[str, ...]
    sentences: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The answers about all models."""

    rows: tuple[Row, ...]

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks of the rows, in their order."""
        return tuple(dict.fromkeys(row.framework for row in self.rows))

    @property
    def broken(self) -> tuple[Row, ...]:
        """Models with a bug."""
        return tuple(row for row in self.rows if row.bug)

    @property
    def false_alarms(self) -> tuple[Row, ...]:
        """Healthy models in which a detector found a fault."""
        return tuple(row for row in self.rows if row.bug is None and row.fired)

    @property
    def missed(self) -> tuple[Row, ...]:
        """Bugs that no detector found."""
        return tuple(row for row in self.broken if not row.fired)

    @property
    def needing_a_reference(self) -> tuple[Row, ...]:
        """Bugs that only the comparison with a healthy twin shows."""
        return tuple(row for row in self.broken if row.fired == ("parity",))

    @property
    def exit_code(self) -> int:
        """0 if every bug was found and there was no false alarm, else 1."""
        return 1 if self.missed or self.false_alarms else 0

    @property
    def summary(self) -> str:
        """The counts in a sentence."""
        healthy = sum(row.bug is None for row in self.rows)
        seen = len(self.broken) - len(self.missed)
        alone = seen - len(self.needing_a_reference)
        bugs = len({row.bug for row in self.broken})
        return (
            f"{bugs} bugs, {len(self.broken)} times planted, {seen} times seen, {alone} of them "
            f"without a reference; {len(self.false_alarms)} false alarms in {healthy} healthy "
            "models."
        )

    def fired(self, bug: str) -> dict[str, tuple[str, ...]]:
        """Return the detectors that fired at a bug, by framework."""
        return {row.framework: row.fired for row in self.broken if row.bug == bug}

    def to_json(self) -> str:
        """Return all rows as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"schema": 1, "summary": self.summary, "rows": rows}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return a table per chapter: a row per bug, a column per detector that fired there."""
        lines = [f"{self.summary}", ""]
        lines += ["● both frameworks, F flax only, T torch only.", ""]
        for category, bugs in GALLERY.items():
            found = {bug.id: self.fired(bug.id) for bug in bugs}
            found = {bug: fired for bug, fired in found.items() if fired}
            seen = {name for fired in found.values() for names in fired.values() for name in names}
            columns = [name for name in NAMES if name in seen]
            if not found:
                continue
            lines += [f"### {category}", "", "| bug | " + " | ".join(columns) + " |"]
            lines += ["|---" * (len(columns) + 1) + "|"]
            for bug, fired in found.items():
                marks = [_mark(name, fired) for name in columns]
                lines.append(f"| {bug} | " + " | ".join(marks) + " |")
            lines.append("")
        return "\n".join(lines)

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("bug", *self.frameworks):
            table.add_column(heading, no_wrap=heading == "bug")
        for bugs in GALLERY.values():
            for bug in bugs:
                if found := self.fired(bug.id):
                    cells = [_cell(found.get(name)) for name in self.frameworks]
                    table.add_row(bug.id, *cells)
        alarms = [
            Text(f"false alarm: {row.framework}, seed {row.seed}: {row.sentences}", style="red")
            for row in self.false_alarms
        ]
        style = "bold red" if self.exit_code else "bold green"
        return Group(table, *alarms, Text(self.summary, style=style))


def measure(
    bugs: Sequence[Bug],
    frameworks: Sequence[str] = FRAMEWORKS,
    healthy_seeds: Sequence[int] = range(20),
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> Matrix:
    """Plant each bug in each twin, and ask every detector about each and about healthy models.

    Args:
        bugs: to plant.
        frameworks: to plant them in.
        healthy_seeds: of the healthy models.
        progress: called with the framework and the fraction done.

    Returns:
        A row per model.
    """
    rows: list[Row] = []
    for framework in frameworks:
        here = [bug for bug in bugs if bug.edits(framework)]
        total = len(here) + len(healthy_seeds)
        for number, bug in enumerate(here):
            progress(framework, number / total)
            with mutated(f"{framework}_gpt", bug.edits(framework)) as package:
                rows.append(_row(framework, package, bug.id, 0))
        for number, seed in enumerate(healthy_seeds, len(here)):
            progress(framework, number / total)
            rows.append(_row(framework, twin(framework), None, seed))
    return Matrix(tuple(rows))


def draw(matrix: Matrix, path: Path) -> None:
    """Draw the matrix: bugs down, detectors across, a colour for each framework.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    bugs = [
        (category, bug.id)
        for category, bugs in GALLERY.items()
        for bug in bugs
        if matrix.fired(bug.id)
    ]
    figure = Figure(figsize=(0.32 * len(NAMES) + 3.4, 0.19 * len(bugs) + 2.2), layout="constrained")
    axis = figure.add_subplot()
    colours = {"both": "#222222", "flax": "#1b6ca8", "torch": "#d1495b"}
    for y, (_, bug) in enumerate(bugs):
        fired = matrix.fired(bug)
        for x, name in enumerate(NAMES):
            where = [framework for framework, names in fired.items() if name in names]
            if where:
                kind = "both" if len(where) == len(fired) else where[0]
                axis.plot(x, y, "s", color=colours[kind], markersize=6)
    edges = [y for y in range(1, len(bugs)) if bugs[y][0] != bugs[y - 1][0]]
    for y in edges:
        axis.axhline(y - 0.5, color="#bbbbbb", linewidth=0.8)
    axis.set_xticks(range(len(NAMES)), NAMES, rotation=60, ha="left", fontsize=8)
    axis.set_yticks(range(len(bugs)), [bug for _, bug in bugs], fontsize=7)
    axis.xaxis.tick_top()
    axis.set_xlim(-0.6, len(NAMES) - 0.4)
    axis.set_ylim(len(bugs) - 0.4, -0.6)
    axis.grid(alpha=0.2, linewidth=0.5)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
    for kind, colour in colours.items():
        label = "every framework that has it" if kind == "both" else f"{kind} alone"
        axis.plot([], [], "s", color=colour, markersize=6, label=label)
    figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    save(figure, path)


def _row(framework: str, package: ModuleType, bug: str | None, seed: int) -> Row:
    drop_programs_if_many()
    model = twin_model(framework, package, seed=seed, healthy=twin(framework))
    found = examine(model, stop_early=False)
    asked = Verdict.PASS, Verdict.FAIL
    return Row(
        framework,
        bug,
        seed,
        found.fired,
        tuple(x.detector.name for x in found.answers if x.finding.verdict in asked),
        {
            x.detector.name: x.finding.sentence
            for x in found.answers
            if x.finding.verdict is Verdict.FAIL
        },
    )


def _cell(fired: tuple[str, ...] | None) -> Text:
    if fired is None:
        return Text("cannot have it", style="dim")
    return Text(", ".join(fired)) if fired else Text("nothing fired", style="bold red")


def _mark(name: str, fired: dict[str, tuple[str, ...]]) -> str:
    where = [framework for framework, names in fired.items() if name in names]
    if not where:
        return ""
    return "●" if len(where) == len(fired) else where[0][0].upper()
