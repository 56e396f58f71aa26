"""Run the real suite: pairs as people write them, healthy and with planted faults.

    python -m tests.real.suite                    every pair, one seed, and every fault
    python -m tests.real.suite --seeds 3 llama vit

A pair is a file of `pairs/` or `transformers_ports/`: `net` and `port` build the two models, `make`
draws the inputs, `torch_call` and `flax_call` are adapters where a call needs one, and `FAULTS` are
edits of that file. A file with several pairs has them in `PAIRS`. Each row shows what the check
found by itself: the rules, the gaps of float64, and whether float64 decided. The exit code is 1 for
a false alarm, a fault that is missed or called by a wrong name, or too few placed and explained.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import flax.nnx
import torch

from parity import ModuleUse, Report, check_pair
from parity.check.levels.names import DTYPES, LEVELS
from parity.faults.edit import Edit, mutated_text
from parity.report.record import IMPURE, Verdict

HERE = Path(__file__).parent
FILES = sorted(
    path for room in ("pairs", "transformers_ports") for path in (HERE / room).glob("*.py")
)
# Those of gaps; others count.
METRICS = "max_abs", "relative_l2", "relative"
# What must be reached: all detected, none misled, these shares, and gaps of float64 up to this.
PLACED, EXPLAINED, FLOAT64 = 0.95, 0.75, 1e-11

_numbers = itertools.count()


class Fault(NamedTuple):
    """A change of a pair's file, and what the check should say of it.

    Attributes:
        title: what is wrong.
        old: text of the file.
        new: text in its place.
        where: paths of modules, split by "|", of which one must be named; None for any.
        cause: words, split by "|", of which the named cause must have one; None where none can be.
    """

    title: str
    old: str
    new: str
    where: str | None
    cause: str | None


class Built(NamedTuple):
    """The two models of a pair, its inputs and how they are called."""

    net: torch.nn.Module
    port: flax.nnx.Module
    make: Callable[..., object]
    torch: ModuleUse
    flax: ModuleUse


@dataclasses.dataclass(frozen=True)
class Row:
    """One check of a pair.

    Attributes:
        name: of the pair.
        fault: planted; None for a healthy pair.
        report: of the check; None where it raised.
        raised: the error's text.
        seconds: that it took.
    """

    name: str
    fault: Fault | None
    report: Report | None
    raised: str
    seconds: float

    @property
    def verdict(self) -> str:
        """The verdict, or RAISED."""
        return str(self.report.verdict) if self.report else "RAISED"

    @property
    def float64(self) -> bool:
        """Whether float64 decided, and did not abstain."""
        notes = [x.note or "" for x in self._records("logits", "gradients")]
        return bool(notes) and not any(note.startswith(IMPURE) for note in notes)

    @property
    def gaps(self) -> tuple[float, float]:
        """The largest float64 gaps of outputs and of gradients, relative; NaN if not measured."""
        return self._gap("logits"), self._gap("gradients")

    def _records(self, *levels: str):
        found = self.report.levels if self.report else ()
        return [record for level in found if level.name in levels for record in level.records]

    def _gap(self, level: str) -> float:
        values = [
            x.value
            for x in self._records(level)
            if x.dtype == "float64" and x.value is not None and x.metric in METRICS
        ]
        return max(values, default=float("nan"))

    @property
    def healthy(self) -> bool:
        """Whether a pair without a fault passed, judged by float64 and within its gap."""
        gaps = [x for x in self.gaps if x == x]
        return self.verdict == Verdict.PASS and self.float64 and max(gaps, default=1) <= FLOAT64

    @property
    def detected(self) -> bool:
        """Whether the check of a pair with a fault failed."""
        return self.verdict == Verdict.FAIL

    @property
    def placed(self) -> bool:
        """Whether the module of the fault is named."""
        found = self.report.divergence if self.report else None
        wanted = self.fault.where if self.fault else None
        return found is not None and (wanted is None or found.where in wanted.split("|"))

    @property
    def explained(self) -> bool:
        """Whether the cause is named."""
        words = (self.fault.cause if self.fault else None) or ""
        return any(word in (self._cause or "") for word in words.split("|") if word)

    @property
    def misled(self) -> bool:
        """Whether another cause is named."""
        return self._cause is not None and not self.explained

    @property
    def _cause(self) -> str | None:
        found = self.report.divergence if self.report else None
        return found.cause if found else None

    def __str__(self) -> str:
        if self.fault is None:
            forward, backward = self.gaps
            decided = "float64" if self.float64 else "ABSTAINED" if self.report else ""
            text = f"{self.name:18} {self.verdict:8} {forward:8.1e} {backward:8.1e} {decided:9}"
            return f"{text} {self.seconds:6.1f} s  {self._why}".rstrip()
        marks = ["detected" if self.detected else "MISSED"]
        marks += ["placed" if self.placed else "ELSEWHERE"] if self.detected else []
        marks += ["MISLED" if self.misled else "explained" if self.explained else "unexplained"]
        where = self.report.divergence.where if self.report and self.report.divergence else ""
        text = f"  {self.fault.title:30} {' '.join(marks):32} {self.seconds:6.1f} s  at {where}"
        return f"{text}: {self._cause or self._why}".rstrip(": ")

    @property
    def _why(self) -> str:
        if self.raised:
            return self.raised
        if self.report and self.report.verdict is not Verdict.PASS:
            bad = [
                f"{level.name}: {record.name} {record.dtype} {record.note or record.value}"
                for level in self.report.levels
                for record in level.unpassed
                if record.verdict in (Verdict.FAIL, Verdict.ERROR)
            ]
            return "; ".join([self.report.summary, *bad[:2]])[:400]
        return ""


def names() -> list[str]:
    """Name every pair, in the order of the files."""
    return [name for path in FILES for name in named(path)]


def program_of(text: str) -> tuple[str, str]:
    """Split a pair's file: its program, and its faults."""
    start = next(text.find(x) for x in ("\nPAIRS = {", "\nFAULTS = [") if x in text)
    return text[:start], text[start:]


def edit_of(path: Path, fault: Fault) -> Edit:
    """Return a fault as an edit of a pair's file."""
    return Edit(path.name, fault.old, fault.new)


@contextlib.contextmanager
def module_of(path: Path, fault: Fault | None = None) -> Iterator[ModuleType]:
    """Import a copy of a pair's file with a fault in it; its source can be read."""
    program, faults = program_of(path.read_text("utf-8"))
    if fault:
        program = mutated_text(path.name, program, [edit_of(path, fault)])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_text(program + faults, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"{path.stem}_{next(_numbers)}", copy)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[spec.name]


def faults_of(name: str) -> list[Fault]:
    """Return the faults of a pair."""
    with module_of(_file(name)) as module:
        given = module.PAIRS[name][3] if hasattr(module, "PAIRS") else module.FAULTS
        return [Fault(*row) for row in given]


def built(module: ModuleType, name: str) -> Built:
    """Build both models of a pair."""
    if hasattr(module, "PAIRS"):
        net, port, make, _ = module.PAIRS[name]
    else:
        net, port, make = module.net, module.port, module.make
    uses = (ModuleUse(call=getattr(module, f"{side}_call", None)) for side in ("torch", "flax"))
    torch.manual_seed(0)
    return Built(net(), port(), make, *uses)


def run(name: str, fault: Fault | None = None, seed: int = 0, **options: object) -> Row:
    """Check a pair, healthy or with a fault in it.

    Args:
        name: of the pair.
        fault: to plant.
        seed: of weights and inputs.
        options: of `check_pair`.

    Returns:
        What came of it; an error that the check raises is kept, not raised.
    """
    start, report, raised = time.perf_counter(), None, ""
    with module_of(_file(name), fault) as module:
        try:
            pair = built(module, name)
            report = check_pair(
                pair.net,
                pair.port,
                pair.make,
                torch=pair.torch,
                flax=pair.flax,
                seed=seed,
                **options,
            )
        except Exception as error:
            raised = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return Row(name, fault, report, raised, time.perf_counter() - start)


def named(path: Path) -> list[str]:
    """Name the pairs of a file."""
    if "\nPAIRS = {" in path.read_text("utf-8"):
        with module_of(path) as module:
            return list(module.PAIRS)
    return [path.stem if path.parent.name == "pairs" else f"hf_{path.stem}"]


def _file(name: str) -> Path:
    for path in FILES:
        if name in named(path):
            return path
    raise ValueError(f"suite: no pair {name}. There are {', '.join(names())}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pairs and print what came of them; return the exit code."""
    parser = argparse.ArgumentParser(description="Check real pairs, healthy and with faults.")
    parser.add_argument("names", nargs="*", help="pairs; all of them when none is named")
    parser.add_argument("--seeds", type=int, default=1, help="of healthy pairs")
    parser.add_argument("--fault-seeds", type=int, default=1, help="of pairs with faults")
    parser.add_argument("--no-faults", action="store_true", help="healthy pairs alone")
    parser.add_argument("--levels", default=",".join(LEVELS), help="split by commas")
    parser.add_argument("--float64", action="store_true", help="leave float32 out")
    given = parser.parse_args(arguments)
    options = dict(levels=given.levels.split(","), dtypes=DTYPES[:1] if given.float64 else DTYPES)
    healthy, planted = [], []
    print(f"{'pair':18} {'verdict':8} {'outputs':8} {'gradients':9} {'decided':9}", flush=True)
    for name in given.names or names():
        for seed in range(given.seeds):
            healthy.append(run(name, seed=seed, **options))
            print(healthy[-1], flush=True)
        faults = [] if given.no_faults else faults_of(name)
        for fault, seed in itertools.product(faults, range(given.fault_seeds)):
            planted.append(run(name, fault, seed, **options))
            print(planted[-1], flush=True)
    good = sum(row.healthy for row in healthy)
    counts = {
        word: sum(getattr(row, word) for row in planted)
        for word in ("detected", "placed", "explained", "misled")
    }
    shares = ", ".join(
        f"{100 * count / max(len(planted), 1):.1f} % {word}" for word, count in counts.items()
    )
    print(
        f"\n{good} of {len(healthy)} checks of healthy pairs pass by float64; of {len(planted)} "
        f"faults {shares}."
    )
    reached = (
        good == len(healthy)
        and counts["detected"] == len(planted)
        and counts["placed"] >= PLACED * len(planted)
        and counts["explained"] >= EXPLAINED * len(planted)
        and not counts["misled"]
    )
    return 0 if reached else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
