"""Runs of both models of a pair that tell weight maps apart."""

import dataclasses
import functools
from collections import Counter

import numpy as np

from parity.check.outputs import output_gap
from parity.check.pair_session import PairSession
from parity.frameworks.batch import Outputs
from parity.frameworks.capture import Trace
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.frameworks.torch.runner import TorchRunner
from parity.frameworks.uses import Uses
from parity.pair.pair import Pair
from parity.system.import_target import in_a_line
from parity.weights.rules import Rules
from parity.weights.weight_map import resolve

# Digits in which sums over arrays of the same numbers in another order agree.
_DIGITS = 9


class PairExperiment:
    """An `Experiment` on a pair whose rules are not known yet, in float64.

    Flax keeps its weights, so that it runs once; torch gets them by one map after the other.
    """

    def __init__(self, pair: Pair):
        self._pair = pair
        self._session = PairSession(pair, dtypes=("float64",))
        self._own = torch_leaves(pair.torch.build("float32"))
        devices, leaves = self._session.devices, self._session.flax_leaves
        self._flax = FlaxRunner(pair.flax, leaves, "float64", devices.flax, lift=True)
        self._torch = TorchRunner(pair.torch, self._own, "float64", devices.torch, lift=True)
        self._leaves = functools.cache(self._leaves)
        self._flax_at = functools.cache(self._flax_at)
        self._flax_outputs = functools.cache(self._flax_outputs)
        self._flax_marks = functools.cache(self._flax_marks)

    def uses(self) -> tuple[Uses | None, Uses | None]:
        """Return how torch and how flax use their leaves; None for a model that cannot say."""
        found: list[Uses | None] = []
        for run in (self._torch, self._flax):
            try:
                found.append(run.uses(self._session.gradient_probe))
            except Exception:  # whatever a model raises that is watched
                found.append(None)
        return found[0], found[1]

    def gap(self, rules: Rules) -> float:
        """Return the difference of the outputs, relative to the largest, for weights so mapped.

        Raises:
            ValueError: when a model cannot be run.
        """
        try:
            flax = self._flax_outputs(_apart(rules))
            torch = self._torch_at(rules).outputs(self._session.gradient_probe)
        except Exception as error:
            raise ValueError(
                f"rules auto: a model raised {type(error).__name__}: {in_a_line(error)}. Names "
                "leave a choice that only running the models can make. Mend the inputs or write a "
                "rules file."
            ) from error
        return output_gap(flax, torch)

    def strangers(self, rules: Rules) -> int:
        """Return how many outputs of torch's modules no module of flax has, for such weights."""
        left, found = self._flax_marks(_apart(rules)).copy(), 0
        for mark in _marks(self._torch_at(rules), self._session):
            found += not left[mark]
            left[mark] -= left[mark] > 0
        return found

    def _flax_at(self, apart: Rules) -> FlaxRunner:
        return self._flax.at(self._leaves(apart))

    def _leaves(self, apart: Rules) -> Leaves:
        return PairSession(dataclasses.replace(self._pair, rules=apart)).flax_leaves

    def _flax_outputs(self, apart: Rules) -> Outputs:
        return self._flax_at(apart).outputs(self._session.gradient_probe)

    def _flax_marks(self, apart: Rules) -> Counter[tuple[object, ...]]:
        return Counter(_marks(self._flax_at(apart), self._session))

    def _torch_at(self, rules: Rules) -> TorchRunner:
        leaves = self._leaves(_apart(rules))
        weight_map = resolve(rules, self._own, leaves)
        return self._torch.at(self._own | weight_map.to_torch(leaves))


def _apart(rules: Rules) -> Rules:
    """Return what rules say of flax's own leaves."""
    return Rules((), flax_ties=rules.flax_ties, flax_ignored=rules.flax_ignored)


def _marks(run: FlaxRunner | TorchRunner, session: PairSession) -> list[tuple[object, ...]]:
    """Return what the outputs of all module calls are, in whatever order of axes."""
    marks: list[tuple[object, ...]] = []

    def note(trace: Trace) -> None:
        x = np.abs(np.asarray(trace.output, np.complex128))
        sums = float(x.sum()), float((x**2).sum())
        marks.append((x.size, *(f"{value:.{_DIGITS}e}" for value in sums)))

    run.traces(session.gradient_probe, note)
    return marks
