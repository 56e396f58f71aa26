"""A fault planted and the check run: was it seen, where was it put, and what was it called?"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax_gpt
from parity.check.check import check
from parity.check.levels.names import HORIZON
from parity.check.modules import pair_of
from parity.faults import Edit, planted
from parity.faults.edit import edited
from parity.faults.selftest.fault import Fault
from parity.pair.pair import Pair
from parity.pair.text import Corpus
from parity.report import Report
from parity.report.record import Verdict
from parity.twins.pair import twins
from parity.weights.rules import Rules

PAIRS = "mlp", "convnet", "encoder", "recurrent", "gpt2"
TWINS = "flax_gpt", "torch_gpt"

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
        fault: that was planted.
        report: of the check.
    """

    fault: Fault
    report: Report

    @property
    def detected(self) -> bool:
        """Whether the check failed."""
        return self.report.verdict is Verdict.FAIL

    @property
    def located(self) -> bool:
        """Whether the level, the module and the step are those of the fault."""
        found, wanted = self.report.divergence, self.fault
        failed = [x.name for x in self.report.levels if x.verdict is Verdict.FAIL]
        if found is None or failed != [wanted.level]:
            return False
        right_step = found.step > 0 if wanted.step is None else found.step == wanted.step
        return right_step and wanted.where in ("", found.where)

    @property
    def explained(self) -> bool:
        """Whether the cause is the fault, in words."""
        cause = self.report.divergence.cause if self.report.divergence else None
        return self.fault.cause is not None and self.fault.cause in (cause or "")

    @property
    def misled(self) -> bool:
        """Whether a cause is named that is not it."""
        named = self.report.divergence is not None and self.report.divergence.cause is not None
        return named and not self.explained


def trial(fault: Fault, corpus: Corpus) -> Outcome:
    """Plants a fault and checks.

    Args:
        fault: to plant.
        corpus: the text of the twins' probes.
    """
    dtypes = ("float64", "float32") if fault.float32 else ("float64",)
    # As many steps as the optimizer level spans, so that both train with one compiled program.
    steps = HORIZON + (fault.level == "trajectory")
    if fault.subject in TWINS:
        framework = fault.subject.removesuffix("_gpt")
        with planted(framework, fault.edits) as broken:
            options = {f"{framework}_package": broken, **fault.options}
            pair = small_twins(corpus, fault.changes, **options)
            return Outcome(fault, check(pair, dtypes=dtypes, steps=steps))
    rules = right_rules(fault.subject).to_toml()
    for right, wrong in fault.rules:
        if right not in rules:
            raise ValueError(f"fault {fault.title}: {right!r} is not in the rules of its pair.")
        rules = rules.replace(right, wrong)
    with pair_module(fault.subject, fault.edits) as module:
        pair = port(module, Rules.parse(rules))
        return Outcome(fault, check(pair, dtypes=dtypes, steps=steps))


def small_twins(corpus: Corpus, changes: Mapping[str, Any] | None = None, **options: Any) -> Pair:
    """Twins that compile fast.

    Args:
        corpus: the text of their probes.
        changes: of their config.
        options: of `parity.twins.pair.twins`; packages may be broken copies.
    """
    config = flax_gpt.GPTConfig(
        vocab_size=len(corpus.vocabulary), context_length=48, embed_dim=20, num_layers=2,
        num_heads=4, mlp_dim=28,
    )  # fmt: skip
    return twins(
        corpus, dataclasses.replace(config, **(changes or {})), max_new_tokens=16, **options
    )


def port(module: types.ModuleType, rules: Rules | str = "auto", seed: int = 0) -> Pair:
    """The pair of a file of ports."""
    return pair_of(module.torch_net(), module.flax_net(), module.inputs, rules=rules, seed=seed)


@functools.cache
def right_rules(name: str) -> Rules:
    """The rules that are inferred for a pair without a fault."""
    with pair_module(name) as module:
        return port(module).rules


@contextlib.contextmanager
def pair_module(name: str, edits: tuple[Edit, ...] = ()) -> Iterator[types.ModuleType]:
    """A file of `parity.faults.selftest.pairs`, in which some places read differently."""
    path = Path(__file__).parent / "pairs" / f"{name}.py"
    text = edited(path.name, path.read_text(encoding="utf-8"), edits)
    spec = importlib.util.spec_from_loader(f"{name}_copy_{next(_numbers)}", loader=None)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes look for their module
    try:
        exec(compile(text, path.name, "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[spec.name]
