"""State shared by all levels of a check: both models, their weights and what is known of them."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np

from parity.check import bounds
from parity.check.null_gradients import NullDirections, null_leaves
from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner, Trainer
from parity.frameworks.purity import AGAIN, Purity
from parity.pair.pair import Pair
from parity.report.plot_data import PlotData
from parity.report.record import IMPURE, Record, Verdict, abstain, judge
from parity.system.memory import hand_back_freed_memory, is_large
from parity.weights.weight_map import WeightMap

Flax_co = TypeVar("Flax_co", bound=Runner, covariant=True)
Torch_co = TypeVar("Torch_co", bound=Runner, covariant=True)


class Session(abc.ABC, Generic[Flax_co, Torch_co]):
    """Both models of a pair in each dtype, or one model beside a recording of the other.

    Attributes:
        pair: the models and inputs.
        dtypes: of the runners, float64 first.
        seed: of the weights, and of how sequences are cut into chunks.
        steps: of the trajectory.
        progress: called with the share of the present level that is done, from 0 to 1.
        plot_data: filled by the levels.
    """

    flax_leaves: Leaves
    weight_map: WeightMap

    def __init__(
        self,
        pair: Pair,
        *,
        dtypes: tuple[str, ...] = ("float64", "float32"),
        seed: int = 0,
        steps: int = 100,
        progress: Callable[[float], None] = lambda fraction: None,
    ):
        self.pair, self.dtypes, self.seed = pair, dtypes, seed
        self.steps, self.progress = steps, progress
        self.plot_data = PlotData()
        self._runs = functools.cache(self._make_runs)
        self.purity = functools.cache(self._make_purity)
        self.gradients = functools.lru_cache(maxsize=1)(self._make_gradients)
        self._dtype: str | None = None
        self._abstained = False  # whether a comparison in float64 did
        self._said: set[str] = set()  # models of which it is said what was lifted

    @abc.abstractmethod
    def _make_runs(self, dtype: str) -> tuple[Flax_co, Torch_co]:
        """Return a runner of each model in a dtype."""

    @abc.abstractmethod
    def perturbed_outputs(
        self, batch: Batch, rounded: str, computed: str, number: int, roundings: int
    ) -> Outputs:
        """Return what one model gives from weights and inputs that are some roundings away.

        Args:
            batch: of the call.
            rounded: the dtype that is rounded to.
            computed: the dtype that is computed in.
            number: for another choice of directions.
            roundings: how far away.
        """

    def runs(self, dtype: str) -> tuple[Flax_co, Torch_co]:
        """Return runners of both models in a dtype; those of another dtype free their memory."""
        if dtype != self._dtype:
            self.release()
            self._dtype = dtype
        return self._runs(dtype)

    def perturbed_run(self, dtype: str, seed: int = 0, roundings: int = 1) -> Torch_co | None:
        """Return the torch side from weights some roundings away; None for a recording."""
        return None

    def release(self) -> None:
        """Free the memory of all that can be loaded or computed again."""
        self.gradients.cache_clear()
        for run in self._runs(self._dtype) if self._dtype else ():
            run.release()
        if self.is_large:
            hand_back_freed_memory()  # which takes a tenth of a second

    def trainer(self, run: Runner, num_steps: int) -> Trainer:
        """Return a trainer of one of the runners with its own model; all runners free theirs."""
        self.release()
        trainer = run.trainer(num_steps)
        if self.is_large:
            hand_back_freed_memory()  # what loading leaves, half a gigabyte for gpt2
        return trainer

    @property
    def companions(self) -> "Mapping[str, Session[Flax_co, Torch_co]]":
        """Sessions of the tiny pairs that are checked beside this one, by name."""
        return {}

    @property
    def is_large(self) -> bool:
        """Whether memory is worth more than time; False before there are any weights."""
        return is_large(vars(self).get("flax_leaves", {}).values())

    @property
    def num_params(self) -> int:
        """Number of weights, tied ones once."""
        return sum(leaf.size for leaf in self.flax_leaves.values())

    @property
    def float64_bound(self) -> float:
        """Bound of outputs, updates and losses in float64."""
        return bounds.float64_bound(self.num_params)

    def _make_purity(self, part: str) -> dict[str, Purity]:
        """Return the purity of the "forward" or "gradient" part of each float64 run, by model."""
        found = {}
        for run in self.runs("float64"):
            if self.is_large:
                self.release()
            measure = run.forward_purity if part == "forward" else run.gradient_purity
            found[run.name] = measure(self.gradient_probe)
        return found

    @functools.cached_property
    def impurities(self) -> dict[str, str]:
        """By model, what is not float64 in its float64 run, for a pair that may have such."""
        if self.pair.pure:
            return {}
        forward, gradient = self._purities
        found = {x: forward[x].impure or gradient.get(x, forward[x]).impure for x in forward}
        return {name: _listed(impure) for name, impure in found.items() if impure}

    @functools.cached_property
    def moved_runs(self) -> list[tuple[Runner, Runner]]:
        """Each float64 run, and the same with the constants moved that it holds in a narrow type.

        They differ by what rounding may have done to these.
        """
        return [(run, run.moved()) for run in self.runs("float64")]

    def decided(self, record: Record, noise: Callable[[int], float]) -> Record:
        """Return a comparison as it is, or judged by what lifting leaves narrow.

        What agrees does so whatever was narrow on the way. What does not may differ by as much as
        constants move it that a model holds in a narrow type; and where an operation stayed narrow,
        it is for float32 to say. A model that computes in 16 bits in places has no bound there.

        Args:
            record: of two runs.
            noise: number of a pair of `moved_runs` to the gap of the two in the record's metric.
        """
        if record.verdict is not Verdict.FAIL or self.pair.pure:
            return record
        if record.dtype == "float32" and self.half_in_places:
            note = f"{self.half_in_places}, of which float32 has no bound"
            return dataclasses.replace(record, verdict=Verdict.ABSTAIN, note=note)
        if record.dtype != "float64":
            return record
        moved = sum(map(noise, range(len(self.moved_runs)))) if self.held_constants else 0.0
        if record.bound is not None and moved > 0.0:
            bound = max(record.bound, bounds.HELD_CONSTANTS * moved)
            verdict = Verdict.PASS if record.gap <= bound else Verdict.FAIL
            what = "within" if verdict is Verdict.PASS else "beyond"
            note = f"{what} what rounding of {', '.join(self.held_constants)} changes"
            note = f"{record.note}; {note}" if record.note and bound < record.gap else note
            record = dataclasses.replace(
                record, bound=bound, noise=moved, verdict=verdict, note=note
            )
        if record.verdict is Verdict.FAIL and self.impurities:
            self._abstained = True
            return abstain("float64", f"{IMPURE}; {self._narrow}")
        return record

    def proof_of_float64(self, part: str) -> Iterator[Record]:
        """Yield proofs that "forward" or "gradient" is in float64, and what was lifted for it.

        Where something stayed narrow, agreement is a proof as well; else the record abstains.
        """
        if self.impurities and self._abstained:
            yield abstain("float64", f"{IMPURE}; {self._narrow}")
            return
        for model, found in self.purity(part).items():
            num, notes = sum(found.impure.values()), []
            if found.impure:
                agreed = "" if self.pair.pure else ", yet the models agree"
                notes = [_listed(found.impure) + agreed]
            if found.lifted and model not in self._said:
                self._said.add(model)
                notes.append(f"{model} computes narrower, lifted: {_listed(found.lifted)}")
            name, bound = f"{model}, {part} in float64", 0 if self.pair.pure else num
            metric, note = "narrow operations", "; ".join(notes) or None
            yield judge(name, "float64", metric, num, bound, found.num_operations, note=note)

    def truth(self, flax: np.ndarray, torch: np.ndarray) -> np.ndarray:
        """Return the float64 output by which float32 is judged: that of a model which is pure."""
        return torch if self.pair.flax.name in self.impurities else flax

    @property
    def _narrow(self) -> str:
        return "; ".join(f"in {name}: {words}" for name, words in self.impurities.items())

    @functools.cached_property
    def _purities(self) -> tuple[dict[str, Purity], dict[str, Purity]]:
        """The purities of both parts; none of the gradient's where there is no gradient."""
        try:
            return self.purity("forward"), self.purity("gradient")
        except Exception:  # the level of the gradients says which
            return self.purity("forward"), {}

    @functools.cached_property
    def held_constants(self) -> list[str]:
        """Constants that a model holds in a narrow type, of a pair that may have such."""
        if self.pair.pure:
            return []
        parts = [found for part in self._purities for found in part.values()]
        words = dict.fromkeys(x for found in parts for x in found.lifted if " constant" in x)
        return [x for x in words if not x.endswith(AGAIN)]

    @functools.cached_property
    def half_type(self) -> str:
        """The coarser type of 16 bits in which a model computes in places; "" for none."""
        parts = [found for part in self._purities for found in part.values()]
        words = [x for found in parts for x in found.lifted]
        types = (x for x in bounds.EPSILON_FLOAT16 if any(y.startswith(x) for y in words))
        return "" if self.pair.pure else next(types, "")

    @property
    def half_in_places(self) -> str:
        """A sentence on `half_type`; "" for none."""
        return self.half_type and f"computed in {self.half_type} in places"

    def loss_unit(self, loss: float) -> float:
        """Return in what gaps of a loss are judged: of a pair that is not pure, its size if > 1."""
        return 1.0 if self.pair.pure else max(1.0, abs(loss))

    @property
    def gradient_probe(self) -> Batch:
        """The batch on which gradients are taken."""
        return next(iter(self.pair.probes.values()))

    def _make_gradients(self, dtype: str) -> tuple[tuple[float, Leaves], tuple[float, Leaves]]:
        """Return loss and gradient of each model, both by flax's names."""
        flax, torch = self.runs(dtype)
        loss, gradients = torch.gradients(self.gradient_probe)
        theirs = loss, self.weight_map.gradients_to_flax(gradients)
        del gradients
        if self.is_large:
            torch.release()
            hand_back_freed_memory()
        loss, gradients = flax.gradients(self.gradient_probe)
        ours = loss, self.weight_map.sum_of_ties(gradients)
        # What is frozen on one side has no gradient there.
        both = ours[1].keys() & theirs[1].keys()
        for _, side in (ours, theirs):
            for name in side.keys() - both:
                del side[name]
        return ours, theirs

    @property
    def _zero(self) -> float:
        return bounds.ZERO_GRADIENT_IMPURE if self.impurities else bounds.ZERO_GRADIENT

    @functools.cached_property
    def null(self) -> NullDirections:
        """Where the gradient is analytically zero, from float64 and both models."""
        return self._gradient_facts[0]

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Leaves whose gradient in float64 holds infinities or NaN in both models."""
        return self._gradient_facts[1]

    @functools.cached_property
    def _gradient_facts(self) -> tuple[NullDirections, tuple[str, ...]]:
        sides = [gradient for _, gradient in self.gradients("float64")]
        bad = [x for x in sides[0] if not any(np.isfinite(side[x]).all() for side in sides)]
        if bad:
            zeros = [{x: np.nan_to_num(side[x], posinf=0, neginf=0) for x in bad} for side in sides]
            sides = [side | zero for side, zero in zip(sides, zeros, strict=True)]
        null = NullDirections.find(sides[0], sides[1], self._zero)
        leaves = tuple(name for name in null.leaves if name not in bad)
        means = tuple(x for x in null.means if x[0] not in bad)
        return dataclasses.replace(null, leaves=leaves, means=means), tuple(bad)

    @functools.cached_property
    def null_in_training(self) -> tuple[str, ...]:
        """Null leaves, and those that training makes null: a batch norm subtracts a bias."""
        leaves = self.weight_map.mapped(self.flax_leaves)
        if self.null.trained == leaves.keys():  # no statistics that training moves
            return self.null.leaves
        moments = []
        converts = self.weight_map.mapped, self.weight_map.to_flax
        for run, convert in zip(self.runs("float64"), converts, strict=True):
            trainer = run.trainer(self.steps)
            batch = self.pair.training_batch(0)
            trainer.step(*batch.inputs, **batch.keywords)
            moments.append(convert(trainer.moments()[0]))
        kept = set.intersection(*map(set, moments))
        moments = [{name: side[name] for name in side if name in kept} for side in moments]
        found = null_leaves(moments, self._zero)
        if set(found) > set(self.null.leaves):
            # The statistics of such a norm follow that bias wherever rounding takes it.
            found += tuple(name for name in leaves if name not in self.null.trained)
        return tuple(dict.fromkeys((*self.null.leaves, *found)))


def _listed(operations: Mapping[str, int]) -> str:
    words = [f"{name} ({n}x)" for name, n in operations.items()]
    more = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more
