"""All that the decode bench found: it prints as tables and goes to JSON."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.bench.complexity import ARGUMENTS, MIN_CONTEXTS, Law
from parity.bench.decode_times import REFERENCE, DecodeCell
from parity.bench.ratios import Ratio, order, ratio_of_pairs, ratios_of_batches, ratios_of_cell
from parity.bench.step_pairs import StepPairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """The outcome: prints as a table per cell, ratios and exponents; goes to JSON.

    Attributes:
        environment: everything about the machine that can change a time.
        preset: name of the model's size.
        config: of the model.
        seed: of weights and prompts.
        cells: the grid.
        capacity_tests: steps in a large cache beside steps in a small one, by framework.
        laws: how costs grow with the context.
    """

    environment: Mapping[str, Any]
    preset: str
    config: Mapping[str, Any]
    seed: int
    cells: tuple[DecodeCell, ...]
    capacity_tests: tuple[StepPairs, ...]
    laws: tuple[Law, ...]

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """What the project has targets for, wherever the cells for it are there."""
        found = [ratio for cell in self.cells for ratio in ratios_of_cell(cell)]
        found += ratios_of_batches(self.cells)
        found += map(ratio_of_pairs, self.capacity_tests)
        return tuple(sorted(found, key=order))

    def to_dict(self) -> dict[str, Any]:
        """The outcome in schema 1."""
        return {
            "schema": 1,
            "bench": "decode",
            "environment": dict(self.environment),
            "preset": self.preset,
            "config": dict(self.config),
            "seed": self.seed,
            "cells": [cell.to_dict() for cell in self.cells],
            "capacity": [pairs.to_dict() for pairs in self.capacity_tests],
            "ratios": [ratio.to_dict() for ratio in self.ratios],
            "complexity": [law.to_dict() for law in self.laws],
        }

    def to_json(self, indent: int | None = None) -> str:
        """The outcome as text: on one line, or indented."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False) + "\n"

    def __rich__(self) -> RenderableType:
        environment = self.environment
        load = f"{environment['load_before']} before and {environment['load_after']} after"
        about = (
            f"{self.preset}; {environment['devices']}; {environment['cores']} cores, load {load}, "
            f"{environment['threads']} torch threads. Medians of rounds in turns; share: weights "
            "and valid cache read once per step, over the best read bandwidth of the same round; "
            f"x tf: speed against {REFERENCE}, round by round; handle and large cache: medians of "
            "single steps in turns; mem.: growth while it was set up and ran first, the twins' own "
            "weights left out."
        )
        ran: dict[str, str] = {}
        for cell in self.cells:
            ran |= {x.name: x.ran for x in cell.contenders if x.turns_s}
        notes = [about, *(f"{name}: {what}." for name, what in ran.items())]
        return Group(
            *self.cells,
            self._ratio_table(),
            *self._complexity(),
            *(Text(note, style="dim") for note in notes),
        )

    def _ratio_table(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        for head in ("ratio", "found", "target", "cell", "context"):
            justify = "right" if head in ("found", "target", "context") else "left"
            table.add_column(head, justify=justify)
        rows: dict[tuple[str, str], list[Ratio]] = {}
        for ratio in self.ratios:
            rows.setdefault((ratio.name, ratio.cell), []).append(ratio)
        for (name, cell), of_row in rows.items():
            found = Text(" ").join(
                Text(f"{x.found:.3g}", style={None: "", True: "green", False: "red"}[x.met])
                for x in of_row
            )
            targets = {x.target for x in of_row if x.target is not None}
            sign = "<=" if of_row[0].at_most else ">="
            contexts = (f"{x.context}" for x in of_row if x.context is not None)
            target = f"{sign} {targets.pop():g}" if targets else ""
            short = cell.replace(", batch ", " x ").replace(", ", " ")
            table.add_row(name, found, target, short, " ".join(contexts))
        note = "targets are for gpt2 in float32 on two CPU cores that nothing else uses"
        return Group(table, Text(note, style="dim"))

    def _complexity(self) -> Iterator[RenderableType]:
        fitted = [law for law in self.laws if law.exponent is not None]
        if not fitted:
            yield Text(f"no exponents are fitted: they need {MIN_CONTEXTS} contexts", style="dim")
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ("cost of a token", "", "context to the power", "from"):
            table.add_column(head)
        for law in fitted:
            table.add_row(
                f"{law.framework} {law.form}", law.quantity, str(law.exponent), law.source
            )
        yield table
        for form, argument in ARGUMENTS.items():
            yield Text(f"{form}: {argument}.", style="dim")
        yield Text(
            "powers: least squares of logarithms over all rounds of all contexts; in brackets 95 % "
            "by Student's t.",
            style="dim",
        )
