"""Grade a starter by what it does, never by how it is written.

A starter is watched in stages that do not depend on each other: each stage is given right code
and fixed weights for everything else. Its numbers are compared with those of the right starter, and
with those of the right starter with any choice of the planted bugs. The choice that gives the
student's numbers is what is still open, so every way to write a right solution is right.

Right and wrong starters are the same functions in both frameworks, so the numbers to compare with
come from the PyTorch templates, whichever framework the student uses.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.exercise.inside import driver, in_torch
from parity.exercise.inside.probes import Values
from parity.exercise.inside.stages import run_stage
from parity.exercise.plants import (
    CATEGORIES,
    MISHAPS,
    PLANTS,
    STAGES,
    Plant,
    chosen,
    fits,
    mutated_files,
    solved,
    subsets,
)
from parity.exercise.sandbox import Outcome, observe
from parity.exercise.starter import CATEGORIES_NAMED, read_exercise

# Relative, for numbers above 1. Two right starters agree to 1e-12. A softmax in float32, which
# jax's own attention has even in float64, is off by 1.2e-6; another epsilon in the last norm, the
# smallest change of the function that was tried, by 4.6e-4.
BOUND = 1e-5
# Initial weights are the student's to draw: means and deviations within a fifth.
START_BOUND = 0.2
START_STD = 0.02  # Config.init_std

_NOTHING_SEEN = "no token sees a later one, rows do not mix, and order makes a difference"
_WATCHED = *STAGES, "symptoms", "together", "part_2"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One planted bug.

    Attributes:
        number: from 1, in the order of the levels.
        plant: the bug.
        state: open, fixed, or unclear where its stage does something that no known bug does.
    """

    number: int
    plant: Plant
    state: str


@dataclasses.dataclass(frozen=True)
class Breakage:
    """Something that was right in the starter and no longer is.

    Attributes:
        stage: where it shows.
        detail: what was seen.
    """

    stage: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of the cache.

    Attributes:
        name: in a word or two.
        passed: whether it holds; None where that could not be seen.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Part2:
    """The cache.

    Attributes:
        state: not begun, passed, failed, or blocked while the forward pass is not right.
        checks: in the order in which they ran.
    """

    state: str
    checks: tuple[Check, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grade:
    """The bugs of one folder, and which are fixed. Prints as a table.

    Attributes:
        framework: flax or torch.
        level: how many bugs were planted.
        seed: of their choice.
        findings: one per planted bug.
        broken: what was right and is wrong now.
        part_2: the cache.
    """

    framework: str
    level: int
    seed: int
    findings: tuple[Finding, ...]
    broken: tuple[Breakage, ...]
    part_2: Part2

    @property
    def open(self) -> tuple[Plant, ...]:
        """Planted bugs that are still there."""
        return self._in("open")

    @property
    def fixed(self) -> tuple[Plant, ...]:
        """Planted bugs that are gone."""
        return self._in("fixed")

    @property
    def unclear(self) -> tuple[Plant, ...]:
        """Planted bugs that cannot be distinguished from a breakage of the same stage."""
        return self._in("unclear")

    @property
    def clean(self) -> bool:
        """Whether no bug is left and nothing was broken; part 2 may not have been begun."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0 for no open bug, 1 for open bugs or a breakage."""
        right = len(self.fixed) == len(self.findings) and not self.broken
        return 0 if right and self.part_2.state in ("not begun", "passed") else 1

    def hints(self, number: int) -> tuple[str, ...]:
        """Return up to three hints for each bug that is not fixed, from vague to clear."""
        return tuple(
            f"bug {finding.number}, hint {count}: {hint}"
            for finding in self.findings
            if finding.state != "fixed"
            for count, hint in enumerate(finding.plant.hints[:number], 1)
        )

    def to_json(self) -> str:
        """Return the grade as JSON, schema 1. It does not name open bugs."""
        document = {
            "schema": 1,
            "framework": self.framework,
            "level": self.level,
            "seed": self.seed,
            "exit_code": self.exit_code,
            "bugs": [
                {"number": finding.number, "state": finding.state, **self._public(finding)}
                for finding in self.findings
            ],
            "broken": [dataclasses.asdict(breakage) for breakage in self.broken],
            "part_2": dataclasses.asdict(self.part_2),
        }
        return json.dumps(document, indent=1) + "\n"

    def __rich__(self) -> RenderableType:
        """Return a row per bug, then breakages and the cache."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("bug", "state", "about"):
            table.add_column(column)
        for finding in self.findings:
            public = self._public(finding)
            about = public.get("title") or public.get("about") or ""
            table.add_row(
                str(finding.number), Text(finding.state, _COLOURS[finding.state]), Text(about)
            )
        lines = [Text(f"broken, {x.stage}: {x.detail}", "bold red") for x in self.broken]
        lines.append(Text(f"part 2, the cache: {self.part_2.state}", _COLOURS[self.part_2.state]))
        for check in self.part_2.checks:
            word = {True: "yes", False: "no", None: "not seen"}[check.passed]
            style = "bold red" if check.passed is False else ""
            lines.append(Text(f"  {check.name}: {word}, {check.detail}", style))
        return Group(table, *lines, Text(self._summary(), "red" if self.exit_code else "green"))

    def _in(self, state: str) -> tuple[Plant, ...]:
        return tuple(finding.plant for finding in self.findings if finding.state == state)

    def _public(self, finding: Finding) -> dict[str, str]:
        """Return what a student may know of a bug: all of it once it is fixed."""
        plant = finding.plant
        if finding.state == "fixed":
            return {"id": plant.id, "title": plant.title, "answer": plant.answer}
        return {"about": CATEGORIES[plant.category]} if self.level <= CATEGORIES_NAMED else {}

    def _summary(self) -> str:
        counts = [
            f"{len(found)} {word}"
            for word, found in (("open", self.open), ("unclear", self.unclear))
            if found
        ]
        counts += [f"{len(self.broken)} broken"] if self.broken else []
        said = f"{len(self.fixed)} of {len(self.findings)} bugs are fixed"
        return f"{self.framework}: {', '.join([said, *counts])}."


_COLOURS = {
    "fixed": "green",
    "open": "bold red",
    "unclear": "yellow",
    "passed": "green",
    "failed": "bold red",
    "blocked": "yellow",
    "not begun": "dim",
}


def grade(folder: Path | str) -> Grade:
    """Run a student's folder in the sandbox and judge what it does.

    Returns:
        The grade.

    Raises:
        ValueError: `write_starter` did not write the folder.
    """
    exercise = read_exercise(folder)
    outcomes = observe(Path(folder), exercise.framework, solved(exercise.framework), _WATCHED)
    plants = chosen(exercise.level, exercise.seed)
    return judge(exercise.framework, exercise.level, exercise.seed, plants, outcomes)


def judge(
    framework: str,
    level: int,
    seed: int,
    plants: tuple[Plant, ...],
    outcomes: Mapping[str, Outcome],
) -> Grade:
    """Judge the outcomes of all stages.

    Args:
        framework: of the starter.
        level: of the exercise.
        seed: of the exercise.
        plants: the bugs that were planted.
        outcomes: by stage.

    Returns:
        The grade.
    """
    verdicts = {
        stage: _decide(stage, outcomes[stage], tuple(x for x in plants if x.stage == stage))
        for stage in STAGES
    }
    others = [verdicts[stage] for stage in STAGES if stage != "training"]
    together = _decide("training", outcomes["together"], ())
    if all(verdict.clean for verdict in others) and together.clean:
        # The loop may ask more of a model than the grader's has; with its own it is right.
        verdicts["training"] = _Verdict(())
    forward = verdicts["forward pass"]
    if forward.open is None and outcomes["symptoms"].values is not None:
        seen = "; ".join(map(str, outcomes["symptoms"].values["seen"])) or _NOTHING_SEEN
        verdicts["forward pass"] = dataclasses.replace(forward, broken=f"{forward.broken}; {seen}")
    by_detail: dict[str, list[str]] = {}
    for stage, verdict in verdicts.items():
        if verdict.broken:
            by_detail.setdefault(verdict.broken, []).append(stage)
    broken = [Breakage(", ".join(found), detail) for detail, found in by_detail.items()]
    if all(verdict.clean for verdict in verdicts.values()) and not together.clean:
        broken.append(
            Breakage("all together", f"each part is right alone, but together: {together.broken}")
        )
    findings = tuple(
        Finding(number, plant, verdicts[plant.stage].state(plant))
        for number, plant in enumerate(plants, 1)
    )
    part_2 = _part_2(outcomes["part_2"], verdicts["forward pass"].clean)
    return Grade(framework, level, seed, findings, tuple(broken), part_2)


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """Of one stage: its open bugs, None when they are unclear; and what else is wrong."""

    open: tuple[Plant, ...] | None
    broken: str = ""

    @property
    def clean(self) -> bool:
        return self.open == () and not self.broken

    def state(self, plant: Plant) -> str:
        if self.open is None:
            return "unclear"
        return "open" if plant in self.open else "fixed"


def _decide(stage: str, outcome: Outcome, here: tuple[Plant, ...]) -> _Verdict:
    """Find the bugs that explain the values of a stage."""
    if outcome.values is None:
        return _Verdict(None, outcome.error or "gave nothing")
    if (found := _explanation(stage, outcome.values, subsets(here))) is not None:
        return _Verdict(found)
    others = [x for x in (*PLANTS, *MISHAPS) if x.stage == stage and x not in here]
    more = ((*subset, plant) for plant in others for subset in subsets(here) if fits(plant, subset))
    if (found := _explanation(stage, outcome.values, more)) is not None:
        return _Verdict(found[:-1], f"now has: {found[-1].title}")
    detail = _difference(stage, outcome.values, expected(stage))
    return _Verdict(None, f"differs in a way that no known bug explains: {detail}")


def _explanation(
    stage: str, values: Values, choices: Iterable[tuple[Plant, ...]]
) -> tuple[Plant, ...] | None:
    """Return the choice of bugs with the values of a stage, the first of equals; None for none."""
    found = [(max(gaps(stage, values, expected(stage, x)).values()), x) for x in choices]
    gap, choice = min(found, key=lambda pair: pair[0], default=(np.inf, ()))
    return choice if gap <= 1.0 else None


@functools.cache
def expected(stage: str, plants: tuple[Plant, ...] = ()) -> Values:
    """Return the values of a stage for a starter with some bugs and no others."""
    with in_torch.scope():
        modules = driver.loaded(mutated_files("torch", plants))
        return run_stage(stage, in_torch, modules, driver.loaded(solved("torch")))


def gaps(stage: str, values: Values, wanted: Values) -> dict[str, float]:
    """Return the largest difference between values and wanted ones, by name, over its bound."""
    if set(values) != set(wanted):
        return {"the names of what it gave": np.inf}
    return {name: _gap(stage, values[name], wanted[name]) for name in wanted}


def _gap(stage: str, value: object, wanted: object) -> float:
    try:
        found_N, wanted_N = np.asarray(value, np.float64), np.asarray(wanted, np.float64)
    except (ValueError, TypeError):
        return np.inf
    if found_N.shape != wanted_N.shape or (np.isnan(found_N) != np.isnan(wanted_N)).any():
        return np.inf
    if stage == "initial weights":  # a mean and a deviation, both against the deviation
        bound_N = START_BOUND * max(wanted_N[1], START_STD)
    else:
        bound_N = BOUND * np.maximum(np.abs(wanted_N), 1.0)
    return float(np.nanmax(np.abs(found_N - wanted_N) / bound_N, initial=0.0))


def _difference(stage: str, values: Values, wanted: Values) -> str:
    """Describe the first value that differs, with numbers."""
    by_name = gaps(stage, values, wanted)
    name = next(name for name, gap in by_name.items() if not gap <= 1.0)
    if name not in wanted:
        return f"it gave {', '.join(values)}"
    if stage == "initial weights":
        (mean, std), (right_mean, right_std) = values[name], wanted[name]
        return (
            f"{name} starts with mean {mean:.3g} and deviation {std:.3g} instead of "
            f"{right_mean:.3g} and {right_std:.3g}"
        )
    found, right = np.asarray(values[name]), np.asarray(wanted[name])
    if found.shape != right.shape:
        return f"{name} has shape {list(found.shape)} instead of {list(right.shape)}"
    if found.size == 1:
        return f"{name} is {float(found):.6g} instead of {float(right):.6g}"
    return f"{name} is off by up to {np.nanmax(np.abs(found - right)):.2g}"


def _part_2(outcome: Outcome, forward_is_right: bool) -> Part2:
    """Judge the cache."""
    if outcome.values is None:
        return Part2("failed", (Check("ran", False, outcome.error or "gave nothing"),))
    if not outcome.values["begun"]:
        return Part2("not begun")
    if not forward_is_right:
        # A token that sees later ones cannot be computed before they are there.
        return Part2("blocked")
    checks = tuple(Check(name, passed, detail) for name, passed, detail in outcome.values["checks"])
    failed = any(check.passed is False for check in checks)
    return Part2("failed" if failed else "passed", checks)
