"""One trial: a fault is planted and the check run. Was it detected, located and explained?"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import flax_gpt
import torch_gpt
from parity.check.check import check
from parity.check.levels.names import HORIZON, LEVELS
from parity.check.modules import pair_of
from parity.faults.edit import Edit, mutated, mutated_text
from parity.faults.selftest.fault import RULES, Changes, Fault
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
    """A fault and the report of the check that met it."""

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
        right_step = found.step > 0 if wanted.step == "later" else found.step == wanted.step
        return right_step and wanted.where in ("", found.where)

    @property
    def explained(self) -> bool:
        """Whether the named cause is the fault."""
        return self.fault.cause is not None and self.fault.cause in (self._named or "")

    @property
    def misled(self) -> bool:
        """Whether another cause is named."""
        return self._named is not None and not self.explained

    @property
    def _named(self) -> str | None:
        return self.report.divergence.cause if self.report.divergence else None


def trial(fault: Fault, corpus: Corpus) -> Outcome:
    """Plant a fault and run the check.

    Args:
        fault: to plant.
        corpus: the text of the twins' probes.

    Returns:
        The fault and the report of the check.
    """
    dtypes = ("float64", "float32") if fault.float32 else ("float64",)
    # As many steps as the optimizer level spans, so that both train with one compiled program.
    steps = HORIZON + (fault.level == "trajectory")
    with contextlib.ExitStack() as copies:
        if fault.subject in TWINS:
            packages: dict[str, ModuleType] = {"flax_gpt": flax_gpt, "torch_gpt": torch_gpt}
            packages[fault.subject] = copies.enter_context(mutated(fault.subject, fault.edits))
            pair = small_twins(
                corpus,
                fault.changes,
                task=fault.task,
                flax_package=packages["flax_gpt"],
                torch_package=packages["torch_gpt"],
                companions=(fault.companion,) if fault.companion else (),
            )
        else:
            module = copies.enter_context(pair_module(fault.subject, fault.edits))
            rules = mutated_text(RULES, right_rules(fault.subject).to_toml(), fault.edits)
            pair = port(module, Rules.parse(rules))
        levels = (fault.level,) if fault.companion else LEVELS  # the others are of its own pair
        return Outcome(fault, check(pair, levels=levels, dtypes=dtypes, steps=steps))


def small_twins(
    corpus: Corpus,
    changes: Changes | None = None,
    *,
    task: str = "next-token",
    seed: int = 0,
    flax_package: ModuleType = flax_gpt,
    torch_package: ModuleType = torch_gpt,
    companions: Sequence[str] = (),
) -> Pair:
    """Make a pair of twins that compile fast.

    Args:
        corpus: the text of their probes.
        changes: of their config.
        task: as for `parity.twins.pair.twins`.
        seed: of the probes.
        flax_package: the Flax twin, or a mutated copy of it.
        torch_package: the PyTorch twin, or a mutated copy of it.
        companions: those that are checked beside it, by name; a user's check has all.

    Returns:
        The two twins as a pair.
    """
    sizes = dict(context_length=48, embed_dim=20, num_layers=2, num_heads=4, mlp_dim=28)
    config = flax_gpt.GPTConfig(vocab_size=len(corpus.vocabulary), **sizes)
    pair = twins(
        corpus,
        dataclasses.replace(config, **(changes or {})),
        task=task,
        seed=seed,
        max_new_tokens=16,
        flax_package=flax_package,
        torch_package=torch_package,
    )
    kept = {name: pair.companions[name] for name in companions}
    return dataclasses.replace(pair, companions=kept)


def port(module: ModuleType, rules: Rules | str = "auto", seed: int = 0) -> Pair:
    """Make the pair that a module of `parity.faults.selftest.pairs` holds."""
    return pair_of(module.torch_net(), module.flax_net(), module.inputs, rules=rules, seed=seed)


@functools.cache
def right_rules(name: str) -> Rules:
    """Infer the rules of a pair without a fault."""
    with pair_module(name) as module:
        return port(module).rules


@contextlib.contextmanager
def pair_module(name: str, edits: Sequence[Edit] = ()) -> Iterator[ModuleType]:
    """Import a copy of a module of `parity.faults.selftest.pairs` with edits in it."""
    path = Path(__file__).parent / "pairs" / f"{name}.py"
    text = mutated_text(path.name, path.read_text(encoding="utf-8"), edits)
    module = ModuleType(f"{name}_copy_{next(_numbers)}")
    sys.modules[module.__name__] = module  # classes look for their module
    try:
        exec(compile(text, path.name, "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]
