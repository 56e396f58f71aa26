"""Run the levels with one module that runs and one that was recorded.

Comparisons and bounds are those of a check of two running models. Only a square matrix cannot be
run on both sides, so that one in the wrong orientation shows in the outputs.
"""

import functools
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from parity.check.levels import gradients, logits, optimizer, trajectory
from parity.check.levels.completeness import every_leaf_once
from parity.check.levels.names import LEVELS
from parity.check.levels.run import Progress, run_levels
from parity.check.metrics import different_bits, largest
from parity.check.outputs import paired
from parity.check.session import Session
from parity.check.trial import Side
from parity.frameworks.handle import handle_of
from parity.frameworks.spec import BY_DEFAULT, ModuleUse
from parity.golden.file import Golden, read
from parity.golden.session import GoldenSession
from parity.report import Divergence, Report
from parity.report.record import Record, Verdict, abstain, judge
from parity.system.devices import num_threads, versions
from parity.weights.rules import Rules

_NOT_RECORDED = "a golden is of outputs and training alone"
_PHASES = {"weights": "weights", "logits": "forward", "gradients": "backward"}


def check(
    golden: Golden | Path | str,
    module: object,
    *,
    rules: Rules | Path | str | None = None,
    use: ModuleUse = BY_DEFAULT,
    levels: Iterable[str] | None = None,
    progress: Progress = lambda level, fraction: None,
) -> Report:
    """Compare a module with a golden in float64; the other framework need not be installed.

        report = check("net.safetensors", port, rules="rules.toml")

    Args:
        golden: or its file.
        module: a torch.nn.Module or a flax.nnx.Module; it is not changed.
        rules: the weight map or its file; None for a golden of the module's own framework.
        use: how it is called, and how it is scored and trained if the golden was so.
        levels: names of levels; all by default.
        progress: called with a level's name and the fraction of it that is done.

    Returns:
        A report as of any check.

    Raises:
        ValueError: for a golden, a module or rules that cannot be used.
    """
    if not isinstance(golden, Golden):
        golden = read(Path(golden))
    here = handle_of(module)
    rules = weight_rules(rules, golden, here.NAME)
    session = GoldenSession(golden, here, module, here.spec(module, use), rules)
    scored, frozen = _scored(golden, Side(here, module, use)), session.frozen()
    if scored or frozen:
        spec = here.spec(module, use, scored, frozen)
        session = GoldenSession(golden, here, module, spec, rules)
    wanted = set(LEVELS if levels is None else levels)
    if unknown := wanted - set(LEVELS):
        raise ValueError(
            f"check: no level {', '.join(sorted(unknown))}. There are {', '.join(LEVELS)}."
        )
    chosen = {
        level: (records, functools.partial(_locate, level))
        for level, records in zip(LEVELS, _RECORDS, strict=True)
        if level in wanted
    }
    finished, divergence = run_levels(chosen, session, progress)
    return Report(_environment(golden, here.NAME), session.about(), finished, divergence)


def _scored(golden: Golden, side: Side) -> list[str] | None:
    """Return the paths of the module's leaves that the recorded loss reads, in its order."""
    name, probe = next(iter(golden.probes.items()))
    outputs = golden.outputs[name]
    if len(outputs) < 2:
        return None
    mine = {leaf.torch_path: leaf.flax_path for leaf in paired(side.outputs(probe)[0], outputs)}
    return [mine[path] for path in sorted(outputs) if outputs[path].dtype.kind in "fc"]


def _weights(session: GoldenSession) -> Iterator[Record]:
    """Record whether the map is complete, and the weights keep their bits there and back."""
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
    """Return a level that refuses a model that leaves float64 on the way."""

    def compare(session: Session) -> Iterator[Record]:
        if session.impurities:
            found = "; ".join(f"{name}: {listed}" for name, listed in session.impurities.items())
            raise ValueError(
                f"not float64 throughout; in {found}. A golden is judged in float64 alone. Check "
                "both models as they run, where float32 decides."
            )
        yield from records(session)

    return compare


_RECORDS: tuple[Callable[[GoldenSession], Iterable[Record]], ...] = (
    _weights,
    *(_in_float64(x.records) for x in (logits, gradients, optimizer, trajectory)),
    lambda session: [abstain("cache", _NOT_RECORDED)],
    lambda session: [abstain("tokens", _NOT_RECORDED)],
)


def _locate(level: str, session: GoldenSession, records: list[Record]) -> Divergence:
    """Return what diverges first; no module's name, for a golden holds no outputs of modules."""
    failed = [record for record in records if record.verdict is Verdict.FAIL]
    bad = failed[0]
    assert bad.value is not None, "what fails has a value"
    where, detail = bad.where or bad.name, bad.note or ""
    if level == "logits":
        where = session.runner.name
        detail = f"On {bad.name}. A check of both models as they run names the module."
    elif level == "gradients":
        gaps = {x.name: x.value for x in failed if x.value is not None}
        where = "loss" if "loss" in gaps else bad.where or largest(gaps)
        detail = f"In {len(failed)} of {len(records)} records the gradients differ, most there."
    elif level in ("optimizer", "trajectory"):
        detail = f"Seen in {bad.name}; all steps before agree."
    return Divergence(where, _PHASES.get(level, "optimizer"), bad.step, bad.value, detail=detail)


def weight_rules(rules: Rules | Path | str | None, golden: Golden, framework: str) -> Rules | None:
    """Return the weight map that a golden and a module of the named framework need, if any."""
    if str(rules) == "auto":
        raise ValueError(
            "rules auto: a golden is one side alone. The map is inferred from two modules. Give a "
            "rules file."
        )
    if (framework != golden.framework) == (rules is not None):
        return rules if rules is None or isinstance(rules, Rules) else Rules.load(Path(rules))
    if rules is None:
        raise ValueError(
            f"golden of {golden.framework} against a {framework} module: no rules. They are "
            "inferred from two modules, and here is one. Give a rules file, which `parity check "
            "--save-rules` writes."
        )
    raise ValueError(
        f"golden of {golden.framework} against a {framework} module: rules given. Its leaves are "
        "the golden's own. Leave the rules out."
    )


def _environment(golden: Golden, framework: str) -> dict[str, str | int]:
    """Return what can change a digit: here, and where the golden was recorded."""
    there = {x: f"{version} (recorded)" for x, version in golden.versions.items()}
    place = {"devices": f"{framework} on cpu", "precision": "highest"}
    here = {"python": platform.python_version()} | versions(framework) | place
    return there | here | {"threads": num_threads(framework)}
