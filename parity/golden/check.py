"""Climbs the levels with one module that runs and one that was recorded.

The comparisons and their bounds are those of a check of two running models. Only a single matrix
cannot be run on both sides, so that one that lies the wrong way round shows in the outputs.
"""

import functools
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from parity.check.levels import gradients, logits, optimizer, trajectory
from parity.check.levels.completeness import every_leaf_once
from parity.check.levels.run import Progress, run_levels
from parity.check.metrics import different_bits, largest
from parity.check.session import Session
from parity.frameworks.leaves import Leaves, different_leaves
from parity.frameworks.spec import ModelSpec
from parity.golden.file import Golden, read
from parity.golden.frameworks import NAMES, framework, framework_of
from parity.golden.recorded import RecordedRunner, name_of
from parity.pair.pair import Pair
from parity.report import Divergence, Report
from parity.report.record import Record, Verdict, abstain, judge
from parity.weights.layouts import Link
from parity.weights.rules import Rules
from parity.weights.weight_map import WeightMap, resolve

Call = Callable[..., Any]
_PHASES = {"weights": "weights", "logits": "forward", "gradients": "backward"}


def check(
    golden: Golden | Path | str,
    module: Any,
    *,
    rules: Rules | Path | str | None = None,
    call: Call | None = None,
    loss: Call | None = None,
    optimizer: Any = None,
    levels: Iterable[str] | None = None,
    progress: Progress = lambda level, fraction: None,
) -> Report:
    """Compares a module with a golden in float64, where the other framework need not exist.

        report = check("net.safetensors", port, rules="rules.toml")

    Args:
        golden: or its file.
        module: a torch.nn.Module or a flax.nnx.Module; it is not changed.
        rules: the weight map or its file; None for a golden of the module's own framework.
        call: (module, *inputs) to outputs; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar, if the golden was recorded with one.
        optimizer: of the module's framework, if the golden was recorded with one.
        levels: names of levels; all by default.
        progress: called with a level's name and how far it is, from 0 to 1.

    Returns:
        A report as of any check.

    Raises:
        ValueError: for a golden, a module or rules that cannot be used.
    """
    if not isinstance(golden, Golden):
        golden = read(Path(golden))
    name = framework_of(module)
    here = framework(name)
    rules = weight_rules(rules, golden, name)
    side = here.side_of(module, call, loss, optimizer)
    session = GoldenSubject(golden, here, module, side, rules)
    wanted = set(RUNGS if levels is None else levels)
    if unknown := wanted - set(RUNGS):
        raise ValueError(
            f"check: no level {', '.join(sorted(unknown))}. There are {', '.join(RUNGS)}."
        )
    rungs = {
        level: (records, functools.partial(_locate, level))
        for level, records in RUNGS.items()
        if level in wanted
    }
    finished, divergence = run_levels(rungs, session, progress)
    return Report(_environment(golden, name), session.about(), finished, divergence)


class GoldenSubject(Session):
    """A module that runs beside one that was recorded.

    For the levels one is the flax side and the other the torch side. Where both are of one
    framework the module that runs is the first of these, and every leaf is its own counterpart.

    Args:
        golden: of one side.
        here: the framework of the other.
        module: of the other.
        side: made of it.
        rules: the weight map; None where both are of one framework.
    """

    def __init__(
        self, golden: Golden, here: ModuleType, module: Any, side: ModelSpec, rules: Rules | None
    ):
        def recorded(*args: Any) -> None:
            raise ValueError("a golden is not run")

        replay = ModelSpec(name_of(golden), recorded, recorded, recorded, trainer=recorded)
        self._runs_first = rules is None or golden.framework == "torch"
        flax, torch = (side, replay) if self._runs_first else (replay, side)
        pair = Pair(
            flax=flax,
            torch=torch,
            rules=rules or Rules(()),
            probes=golden.probes,
            training_batch=lambda step: golden.batches[step],
            learning_rate=golden.learning_rate,
            pure=False,
        )
        super().__init__(pair, dtypes=("float64",), seed=golden.seed, steps=len(golden.batches))
        self.golden, self._here, self._spec = golden, here, side
        self._is_alike = rules is None
        self._own = here.leaves_of_side(side, "float64")
        self._fixed = here.fixed(module)
        if self._is_alike and (problems := different_leaves(golden.weights, self._own)):
            raise ValueError(
                f"golden of {golden.model}: {'; '.join(problems[:5])}. The module is not the one "
                "that was recorded. Mend it or record it again."
            )

    @functools.cached_property
    def weight_map(self) -> WeightMap:
        """The rules resolved for the module and the golden.

        Raises:
            TransplantError: when they do not fit.
        """
        if self._is_alike:
            links = tuple(Link((name,), (name,)) for name in self._own)
            shapes = {name: leaf.shape for name, leaf in self._own.items()}
            return WeightMap(links, (), (), shapes, shapes)
        ours = self.golden.weights, self._own
        torch, flax = ours if self._runs_first else ours[::-1]
        return resolve(self.pair.rules, torch, flax)

    @functools.cached_property
    def flax_leaves(self) -> Leaves:
        """The recorded weights, as the flax side has them."""
        if self._is_alike or not self._runs_first:
            return self.golden.weights
        return self.weight_map.to_flax(self.golden.weights)

    @functools.cached_property
    def run(self) -> Any:
        """The module, with the recorded weights."""
        if self._is_alike:
            weights = dict(self.golden.weights)
        elif self._runs_first:
            weights = self.flax_leaves
        else:
            weights = self._own | self.weight_map.to_torch(self.golden.weights)
        # A table that the code computes is the code's to answer for.
        return self._here.run_of(self._spec, weights | {x: self._own[x] for x in self._fixed})

    def restored(self) -> Leaves:
        """The module's weights, brought back to the names and layouts of the golden."""
        found = self._here.leaves_of_run(self.run)
        if self._is_alike:
            return {name: leaf for name, leaf in found.items() if name not in self._fixed}
        move = self.weight_map.to_torch if self._runs_first else self.weight_map.to_flax
        return move(found)

    def about(self) -> dict[str, Any]:
        """What the report says of both."""
        other = NAMES[1 - NAMES.index(self._here.NAME)]
        weights = self.golden.weights if self.golden.framework == "flax" else self._own
        return {
            self._here.NAME: self._spec.name,
            other: name_of(self.golden),
            "num_params": sum(leaf.size for leaf in weights.values()),
            "config": {
                "golden": self.golden.model,
                "recorded with": ", ".join(f"{x} {y}" for x, y in self.golden.versions.items()),
                "seed": self.golden.seed,
                "steps": self.steps,
            },
        }

    def _make_runs(self, dtype: str) -> tuple[Any, Any]:
        replay = RecordedRunner(self.golden)
        return (self.run, replay) if self._runs_first else (replay, self.run)


def _weights(session: GoldenSubject) -> Iterator[Record]:
    """The map is complete, and the recorded weights keep their bits in the module and back."""
    first = every_leaf_once(session, "float64")
    yield first
    if first.verdict is not Verdict.PASS:
        return
    recorded, back = session.golden.weights, session.restored()
    bits = sum(different_bits(recorded[name], leaf) for name, leaf in back.items())
    size = sum(leaf.size for leaf in back.values())
    yield judge("golden to module to golden", "float64", "different bits", bits, 0, size)


def _in_float64(
    records: Callable[[Session], Iterable[Record]],
) -> Callable[[Session], Iterator[Record]]:
    """The records of a level, which a model cannot have that leaves float64 on the way."""

    def compare(session: Session) -> Iterator[Record]:
        if session.impurities:
            words = "; ".join(f"{name}: {found}" for name, found in session.impurities.items())
            raise ValueError(
                f"not float64 throughout; in {words}. A golden is judged in float64 alone. Check "
                "both models as they run, where float32 decides."
            )
        yield from records(session)

    return compare


def _untold(level: str) -> Callable[[Session], Iterator[Record]]:
    return lambda session: iter([abstain(level, "a golden is of outputs and training alone")])


# The names of parity.check.check.LEVELS, which imports both frameworks; a test holds them equal.
RUNGS: dict[str, Callable[[GoldenSubject], Iterable[Record]]] = {
    "weights": _weights,
    "logits": _in_float64(logits.records),
    "gradients": _in_float64(gradients.records),
    "optimizer": _in_float64(optimizer.records),
    "trajectory": _in_float64(trajectory.records),
    "cache": _untold("cache"),
    "tokens": _untold("tokens"),
}


def _locate(level: str, session: GoldenSubject, records: list[Record]) -> Divergence:
    """What parts first; a golden holds no outputs of modules, so no module is named."""
    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    where, detail = bad.where or bad.name, bad.note or ""
    if level == "logits":
        where = session.run.name
        detail = f"On {bad.name}. A check of both models as they run names the module."
    elif level == "gradients":
        failed = {x.name: x.value for x in records if x.verdict is Verdict.FAIL}
        where = "loss" if "loss" in failed else bad.where or largest(failed)
        detail = f"In {len(failed)} of {len(records)} records the gradients differ, most there."
    elif level in ("optimizer", "trajectory"):
        detail = f"Seen in {bad.name}; all steps before agree."
    return Divergence(where, _PHASES.get(level, "optimizer"), bad.step, bad.value, detail=detail)


def weight_rules(rules: Rules | Path | str | None, golden: Golden, name: str) -> Rules | None:
    """The weight map that a golden and a module of the named framework need.

    Raises:
        ValueError: for a file that is none, and where one is needed or is not.
    """
    if str(rules) == "auto":
        raise ValueError(
            "rules auto: a golden is one side alone. The map is inferred from two modules. Give a "
            "rules file."
        )
    if (name != golden.framework) == (rules is not None):
        return rules if rules is None or isinstance(rules, Rules) else Rules.load(Path(rules))
    if rules is None:
        raise ValueError(
            f"golden of {golden.framework} against a {name} module: no rules. They are inferred "
            "from two modules, and here is one. Give a rules file, which `parity check "
            "--save-rules` writes."
        )
    raise ValueError(
        f"golden of {golden.framework} against a {name} module: rules given. Its leaves are the "
        "golden's own. Leave the rules out."
    )


def _environment(golden: Golden, name: str) -> dict[str, str | int]:
    """What can change a digit: here, and of the other framework where it was recorded."""
    here = framework(name)
    there = {x: f"{version} (recorded)" for x, version in golden.versions.items()}
    about = {"python": platform.python_version(), "numpy": np.__version__}
    place = {"devices": f"{name} on cpu", "precision": "highest", "threads": here.threads()}
    return there | about | here.versions() | place
