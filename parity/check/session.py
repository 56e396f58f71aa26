"""State shared by all levels of a check: both models, their weights and what is known of them."""

import abc
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np

from parity.check import bounds
from parity.check.null_gradients import NullDirections, null_leaves
from parity.frameworks.batch import Batch
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner, Trainer
from parity.pair.pair import Pair
from parity.report.plot_data import PlotData
from parity.report.record import IMPURE, Record, abstain, judge
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
        self.gradients = functools.lru_cache(maxsize=1)(self._make_gradients)
        self._dtype: str | None = None

    @abc.abstractmethod
    def _make_runs(self, dtype: str) -> tuple[Flax_co, Torch_co]:
        """Return a runner of each model in a dtype."""

    def runs(self, dtype: str) -> tuple[Flax_co, Torch_co]:
        """Return runners of both models in a dtype; those of another dtype free their memory."""
        if dtype != self._dtype:
            self.release()
            self._dtype = dtype
        return self._runs(dtype)

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

    @functools.cached_property
    def impurities(self) -> dict[str, str]:
        """By model, what is not float64 in its float64 run, for a pair that may have such."""
        found = {}
        for run in self.runs("float64") if not self.pair.pure else ():
            batch = self.gradient_probe
            if impure := run.forward_purity(batch).impure or run.gradient_purity(batch).impure:
                words = _counted(impure)
                more = f" and {len(words) - 3} more" if len(words) > 3 else ""
                found[run.name] = ", ".join(words[:3]) + more
        return found

    def proof_of_float64(self, part: str) -> Iterator[Record]:
        """Yield proofs that "forward" or "gradient" is in float64, or a record that abstains."""
        if self.impurities:
            models = "; ".join(f"{name}: {words}" for name, words in self.impurities.items())
            yield abstain("float64", f"{IMPURE}; in {models}")
            return
        for run in self.runs("float64"):
            if self.is_large:
                self.release()
            measure = run.forward_purity if part == "forward" else run.gradient_purity
            found = measure(self.gradient_probe)
            name, num = f"{run.name}, {part} in float64", sum(found.impure.values())
            note = ", ".join(_counted(found.impure)) or None
            metric, count = "narrow operations", found.num_operations
            yield judge(name, "float64", metric, num, 0, count, note=note)

    def truth(self, flax: np.ndarray, torch: np.ndarray) -> np.ndarray:
        """Return the float64 output by which float32 is judged: that of a model which is pure."""
        return torch if self.pair.flax.name in self.impurities else flax

    @property
    def gradient_probe(self) -> Batch:
        """The batch on which gradients are taken."""
        return next(iter(self.pair.probes.values()))

    def _make_gradients(self, dtype: str) -> tuple[tuple[float, Leaves], tuple[float, Leaves]]:
        """Return loss and gradient of each model, both by flax's names."""
        flax, torch = self.runs(dtype)
        loss, gradients = torch.gradients(self.gradient_probe)
        theirs = loss, self.weight_map.to_flax(gradients)
        del gradients
        if self.is_large:
            torch.release()
            hand_back_freed_memory()
        loss, gradients = flax.gradients(self.gradient_probe)
        return (loss, self.weight_map.sum_of_ties(gradients)), theirs

    @property
    def _zero(self) -> float:
        return bounds.ZERO_GRADIENT_IMPURE if self.impurities else bounds.ZERO_GRADIENT

    @functools.cached_property
    def null(self) -> NullDirections:
        """Where the gradient is analytically zero, from float64 and both models."""
        (_, flax), (_, torch) = self.gradients("float64")
        return NullDirections.find(flax, torch, self._zero)

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
            trainer.step(*self.pair.training_batch(0).inputs)
            moments.append(convert(trainer.moments()[0]))
        found = null_leaves(moments, self._zero)
        if set(found) > set(self.null.leaves):
            # The statistics of such a norm follow that bias wherever rounding takes it.
            found += tuple(name for name in leaves if name not in self.null.trained)
        return tuple(dict.fromkeys((*self.null.leaves, *found)))


def _counted(operations: Mapping[str, int]) -> list[str]:
    return [f"{name} ({n}x)" for name, n in operations.items()]
