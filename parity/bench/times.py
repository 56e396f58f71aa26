"""The outcome of a bench as values: they print as tables and go to JSON."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import flax_gpt

REFERENCE = "torch eager"  # whom speeds are relative to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender's time; without turns where it could not run.

    Attributes:
        name: of the contender.
        framework: flax or torch.
        ran: what exactly was timed.
        unavailable: why it could not run; None where it did.
        compile_s: seconds of compilation, which no turn contains; None where nothing is compiled.
        memory_bytes: what a step needs beyond weights, moments and batch; None where unknown.
        steps_per_turn: steps that a turn consists of.
        turns_s: seconds per step, by round.
    """

    name: str
    framework: str
    ran: str
    unavailable: str | None = None
    compile_s: float | None = None
    memory_bytes: int | None = None
    steps_per_turn: int = 0
    turns_s: tuple[float, ...] = ()

    @property
    def step_s(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.turns_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
    """All contenders on one preset.

    Attributes:
        preset: its name.
        config: of the model.
        batch_size: rows of a batch.
        width: tokens of a row.
        flop: of one step, see `flop_per_step`.
        losses: of the first steps, by contender, which agree within `bound`.
        bound: see `DTYPES`.
        timings: by contender.
        matmul_sizes: size of the fastest product, by framework.
        matmul_rates: its FLOP/s in each round, by framework.
    """

    preset: str
    config: flax_gpt.GPTConfig
    batch_size: int
    width: int
    flop: int
    losses: Mapping[str, Sequence[float]]
    bound: float
    timings: tuple[Timing, ...]
    matmul_sizes: Mapping[str, int]
    matmul_rates: Mapping[str, Sequence[float]]

    def share_of_matmul(self, timing: Timing, framework: str | None = None) -> float:
        """Achieved FLOP/s over a framework's matmul rate, or the faster one's; median of rounds."""
        rates = [self.matmul_rates[framework]] if framework else self.matmul_rates.values()
        roofs = [max(of_round) for of_round in zip(*rates, strict=True)]
        pairs = zip(timing.turns_s, roofs, strict=True)
        return statistics.median(self.flop / seconds / roof for seconds, roof in pairs)

    def speed(self, timing: Timing) -> float:
        """How many times as fast as torch eager; median of rounds."""
        reference = next(x for x in self.timings if x.name == REFERENCE)
        pairs = zip(reference.turns_s, timing.turns_s, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def to_dict(self) -> dict[str, Any]:
        """The contest as JSON has it."""
        gap = float(np.max(np.ptp(list(self.losses.values()), axis=0)))
        return {
            "preset": self.preset,
            "batch_size": self.batch_size,
            "width": self.width,
            "config": dataclasses.asdict(self.config),
            "flop_per_step": self.flop,
            "agreement": {"losses": self.losses, "gap": gap, "bound": self.bound},
            "matmul": {
                name: {
                    "size": self.matmul_sizes[name],
                    "flop_per_s": statistics.median(rates),
                    "rounds_flop_per_s": list(rates),
                }
                for name, rates in self.matmul_rates.items()
            },
            "contenders": [self._contender(timing) for timing in self.timings],
        }

    def _contender(self, timing: Timing) -> dict[str, Any]:
        ran = timing.unavailable is None
        return {
            "name": timing.name,
            "framework": timing.framework,
            "ran": timing.ran,
            "unavailable": timing.unavailable,
            "compile_s": timing.compile_s,
            "step_s": timing.step_s if ran else None,
            "fastest_s": min(timing.turns_s) if ran else None,
            "slowest_s": max(timing.turns_s) if ran else None,
            "rounds_s": list(timing.turns_s),
            "steps_per_round": timing.steps_per_turn,
            "tokens_per_s": self.batch_size * self.width / timing.step_s if ran else None,
            "flop_per_s": self.flop / timing.step_s if ran else None,
            "share_of_own_matmul": self.share_of_matmul(timing, timing.framework) if ran else None,
            "share_of_fastest_matmul": self.share_of_matmul(timing) if ran else None,
            "speed_over_torch_eager": self.speed(timing) if ran else None,
            "memory_bytes": timing.memory_bytes,
        }

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(self.preset, no_wrap=True)
        for name in ("compile", "step", "min..max", "tokens/s", "GFLOP/s", "matmul", "speed"):
            table.add_column(name, justify="right", no_wrap=True)
        for timing in self.timings:
            if timing.unavailable is not None:
                table.add_row(timing.name, Text("none", style="yellow"))
                continue
            shares = self.share_of_matmul(timing, timing.framework), self.share_of_matmul(timing)
            spread = min(timing.turns_s), max(timing.turns_s)
            table.add_row(
                timing.name,
                "" if timing.compile_s is None else f"{timing.compile_s:.1f}s",
                _in_unit(timing.step_s, timing.step_s) + ("s" if timing.step_s >= 1.0 else "ms"),
                "..".join(_in_unit(seconds, timing.step_s) for seconds in spread),
                f"{self.batch_size * self.width / timing.step_s:,.0f}",
                f"{self.flop / timing.step_s / 1e9:,.1f}",
                " ".join(f"{share * 100:.0f}" for share in shares) + "%",
                f"{self.speed(timing):.2f}x",
            )
        rounds = max(len(timing.turns_s) for timing in self.timings)
        roofs = (
            f"{name} {statistics.median(rates) / 1e9:,.1f} GFLOP/s (size {self.matmul_sizes[name]})"
            for name, rates in self.matmul_rates.items()
        )
        notes = [
            f"{self.batch_size} x {self.width} tokens, {self.flop / 1e9:,.2f} GFLOP a step, "
            f"{rounds} rounds; matmul: {', '.join(roofs)}"
        ]
        notes += [f"{x.name}: {x.unavailable}" for x in self.timings if x.unavailable is not None]
        return Group(table, *(Text(note, style="dim") for note in notes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBench:
    """The outcome: prints as a table per preset, goes to JSON.

    Attributes:
        environment: everything about the machine that can change a time.
        dtype: of forward and backward pass.
        training: constants of the optimizer.
        contests: one per preset.
    """

    environment: Mapping[str, Any]
    dtype: str
    training: Mapping[str, Any]
    contests: tuple[Contest, ...]

    def to_json(self) -> str:
        """The outcome in schema 1."""
        document = {
            "schema": 1,
            "bench": "training",
            "environment": self.environment,
            "dtype": self.dtype,
            "training": self.training,
            "presets": [contest.to_dict() for contest in self.contests],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    def __rich__(self) -> RenderableType:
        environment = self.environment
        load = f"{environment['load_before']} before and {environment['load_after']} after"
        about = (
            f"{self.dtype}; {environment['devices']}; {environment['cores']} cores, load {load}. "
            "matmul: share of the framework's own rate, and of the faster one's. "
            "speed: against torch eager, round by round. Medians everywhere."
        )
        ran = {x.name: x.ran for contest in self.contests for x in contest.timings}
        notes = [about, *(f"{name}: {what}." for name, what in ran.items())]
        return Group(*self.contests, *(Text(note, style="dim") for note in notes))


def _in_unit(seconds: float, like: float) -> str:
    """Three digits, in seconds or milliseconds as another time has it."""
    scaled = seconds if like >= 1.0 else seconds * 1e3
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}"
