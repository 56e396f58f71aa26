"""Plans of cache operations, each read of which is compared with one pass without a cache."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from parity.check import bounds
from parity.check.metrics import scale_of
from parity.check.pair_session import PairSession
from parity.frameworks.batch import Batch
from parity.frameworks.plan import (
    Limits,
    Plan,
    Read,
    Row,
    alternatives,
    draw,
    is_possible,
    prefixes,
    reads,
    rows_of_pass,
    shrunk,
)
from parity.frameworks.protocols import LiveRunner, PlanDecoder
from parity.report import Divergence
from parity.report.record import Record, first_failed, judge

_SECONDS = 20.0  # spent at most on making a plan shorter


def records(session: PairSession) -> Iterator[Record]:
    """Compare what reads of plans give with one pass without a cache, in float64."""
    for name, other in session.companions.items():
        for run in other.runs("float64"):
            yield Trials(other, run).record(f"{name}: {run.name}, plans")


def locate(session: PairSession, records: Sequence[Record]) -> Divergence | None:
    """Return the operation of a plan that differs, made short, with the lines that show it.

    None where what failed first is no plan.
    """
    bad = first_failed(records)
    for name, other in session.companions.items():
        for run in other.runs("float64"):
            if bad.name.startswith(f"{name}: {run.name}, "):
                return Trials(other, run).located(name)
    return None


@dataclasses.dataclass(frozen=True)
class _Gap:
    """Where a plan differs most.

    Attributes:
        value: of the largest logit; infinity where something was raised.
        number: of the operation.
        row: of its call.
        index: of the token among those of the row that were scored.
        history: all tokens of the row up to that one.
        note: what was raised.
    """

    value: float = 0.0
    number: int = 0
    row: int = 0
    index: int = 0
    history: Row = ()
    note: str = ""


class Trials:
    """One model and the plans that it is given."""

    def __init__(self, session: PairSession, run: LiveRunner):
        self._run, self._seed = run, session.seed
        self._decoder = cast("PlanDecoder", run.decoder())  # as all pairs with plans have
        self._limits: Limits = session.pair.plans[run.name]
        self.num_numbers = 0

    def record(self, name: str) -> Record:
        """Return the largest gap of all plans."""
        plans = self._plans()
        expected = _Expected(self._run, self._limits, plans)
        gaps = [self._gap(plan, expected) for plan in plans]
        values = [gap.value for gap in gaps]
        worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap.value) else gap.value)
        note = f"plan {values.index(worst.value)}" if worst.value > 0.0 else None
        bound = bounds.CACHE["float64"]
        found = judge(name, "float64", "max_abs", worst.value, bound, self.num_numbers)
        if worst.value <= bound:
            return found
        return dataclasses.replace(found, note=f"{note}. {worst.note}".rstrip(". "))

    def located(self, name: str) -> Divergence | None:
        """Return the shortest plan found that fails, with what makes it right."""
        failing = next((plan for plan in self._plans() if self._fails(plan)), None)
        if failing is None:
            return None
        failing = failing[: self._alone(failing).number + 1]
        plan = shrunk(failing, self._limits, self._fails, _SECONDS)
        gap = self._alone(plan)
        plan = plan[: gap.number + 1]
        last = plan[-1]
        where = f"{self._run.name}, {last.way if isinstance(last, Read) else type(last).__name__}"
        cause = next(
            (
                f"{self._run.name} agrees with its uncached pass with {words}"
                for words, other in alternatives(plan)
                if is_possible(other, self._limits) and not self._fails(other)
            ),
            None,
        )
        lines = self._decoder.script(plan, gap.row, gap.index, gap.history)
        note = f", {gap.note}" if gap.note else ""
        detail = f"In the model with {name}{note}. The lines that show it:\n{lines}\n"
        return Divergence(where, "decode", len(plan), gap.value, cause=cause, detail=detail)

    def _plans(self) -> list[Plan]:
        seeds = ((self._seed, number) for number in range(self._limits.plans))
        return [draw(np.random.default_rng(seed), self._limits) for seed in seeds]

    def _fails(self, plan: Plan) -> bool:
        return not self._alone(plan).value <= bounds.CACHE["float64"]

    def _alone(self, plan: Plan) -> _Gap:
        return self._gap(plan, _Expected(self._run, self._limits, [plan]))

    def _gap(self, plan: Plan, expected: "_Expected") -> _Gap:
        """Return where a plan differs first from a pass without a cache, or its largest gap."""
        try:
            found = self._decoder.follow(plan)
        except Exception as error:
            note = f"{type(error).__name__}: {error}".splitlines()[0]
            return _Gap(math.inf, len(plan) - 1, note=note)
        worst = _Gap()
        for number, rows in reads(plan, self._limits):
            for row, (history, logits) in enumerate(zip(rows, found[number], strict=True)):
                self.num_numbers += logits.size
                for index, x in enumerate(logits):
                    end = len(history) - len(logits) + index + 1
                    wanted = expected.of(history, end)
                    gap = float(np.max(np.abs(x - wanted))) / expected.scale
                    if not gap <= worst.value:
                        worst = _Gap(gap, number, row, index, history[:end])
                        if math.isnan(gap):
                            return dataclasses.replace(worst, value=math.inf, note="NaN")
            if not worst.value <= bounds.CACHE["float64"]:
                return worst
        return worst


class _Expected:
    """Logits of all rows of some plans, from one pass without a cache."""

    def __init__(self, run: LiveRunner, limits: Limits, plans: Sequence[Plan]):
        histories = [
            row for plan in plans for _, rows in reads(plan, limits) for row in rows if row
        ]
        rows, self._row_of = prefixes(histories)
        context = limits.context_length
        size = rows_of_pass(context)
        parts = []
        for start in range(0, len(rows), size):
            tokens = np.zeros((size, context), np.int32)
            counts = np.ones(size, np.int32)
            for index, row in enumerate(rows[start : start + size]):
                tokens[index, : len(row)], counts[index] = row, len(row)
            parts.append(run.outputs(Batch((tokens, counts)))[""])
        self._logits = np.concatenate(parts) if parts else np.zeros((0, context, 0))
        real = [self._logits[index, : len(row)].ravel() for index, row in enumerate(rows)]
        self.scale = scale_of(np.concatenate([*real, np.zeros(0)]))

    def of(self, history: Row, end: int) -> np.ndarray:
        """Return the logits (V,) after the first `end` tokens of a row."""
        return self._logits[self._row_of[history], end - 1]
