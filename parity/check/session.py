"""Two models under test as the levels see them, and what the levels learn about the weights."""

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Set

import numpy as np

from parity.check.metrics import along_ones, gradient_norm
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner, Trainer
from parity.frameworks.spec import Batch
from parity.pair.pair import Pair
from parity.report.plot_data import PlotData
from parity.report.record import IMPURE
from parity.system.memory import hand_back_freed_memory, is_large
from parity.weights.weight_map import WeightMap

# A gradient this far below the whole gradient is rounding: 1e4 units of float64's last place.
_NULL = 1e-12
# And of float32's, where a run is partly in that.
_NULL_IMPURE = 1e-5


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is kept of gradients, which take as much memory as the models."""

    names: Set[str]
    norm: float
    null_leaves: tuple[str, ...]
    null_means: tuple[tuple[str, int], ...]


class Session(abc.ABC):
    """What every level works on: a pair that runs, or one side of it beside what was recorded.

    Attributes:
        pair: the models and inputs.
        dtypes: of the runs, float64 first.
        seed: of the weights, and of how sequences are cut into calls.
        steps: of the trajectory.
        progress: told how far the present level is, from 0 to 1.
        evidence: what levels have seen that is worth a plot.
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
        self.pair, self.dtypes = pair, dtypes
        self.steps, self.progress = steps, progress
        self.seed = seed
        self.evidence = PlotData()
        self._runs = functools.cache(self._make_runs)
        self.gradients = functools.lru_cache(maxsize=1)(self._make_gradients)
        self._dtype: str | None = None

    @abc.abstractmethod
    def _make_runs(self, dtype: str) -> tuple[Runner, Runner]:
        """Both models in a dtype, as runs that answer in NumPy."""

    def runs(self, dtype: str) -> tuple[Runner, Runner]:
        """Both models in a dtype. Those of another dtype give their memory back."""
        if dtype != self._dtype:
            self.release()
            self._dtype = dtype
        return self._runs(dtype)

    def release(self) -> None:
        """Gives back the memory of what can be had again."""
        self.gradients.cache_clear()
        for run in self._runs(self._dtype) if self._dtype else ():
            run.release()
        if self.is_large:
            hand_back_freed_memory()  # which takes a tenth of a second

    def trainer(self, run: Runner, num_steps: int) -> Trainer:
        """A trainer of one of the runs, which has a model of its own; others give theirs back."""
        self.release()
        trainer = run.trainer(num_steps)
        if self.is_large:
            hand_back_freed_memory()  # what loading leaves behind, half a gigabyte for gpt2
        return trainer

    def make_room(self) -> None:
        """The same for a large model only, where memory is worth more than loading it again."""
        if self.is_large:
            self.release()

    @property
    def is_large(self) -> bool:
        """Whether memory is worth more than time; False before there are any weights."""
        return is_large(vars(self).get("flax_leaves", {}).values())

    @property
    def num_params(self) -> int:
        """Weights of the model, tied ones once."""
        return sum(leaf.size for leaf in self.flax_leaves.values())

    @functools.cached_property
    def impurities(self) -> dict[str, str]:
        """By side, what is not float64 in its float64 run, for a pair that may have such."""
        found = {}
        for run in self.runs("float64") if not self.pair.pure else ():
            forward, both = (
                purity(self.gradient_probe).impure
                for purity in (run.forward_purity, run.gradient_purity)
            )
            if impure := forward or both:
                words = [f"{name} ({n}x)" for name, n in impure.items()]
                more = f" and {len(words) - 3} more" if len(words) > 3 else ""
                found[run.name] = ", ".join(words[:3]) + more
        return found

    @property
    def weaker_claim(self) -> str:
        """What float64 cannot show where it is not pure, in words."""
        sides = "; ".join(f"{name}: {words}" for name, words in self.impurities.items())
        return f"{IMPURE}; in {sides}"

    def truth(self, flax: np.ndarray, torch: np.ndarray) -> np.ndarray:
        """The output in float64 that float32 is judged by: that of a side which is pure."""
        return torch if self.pair.flax.name in self.impurities else flax

    @property
    def gradient_probe(self) -> Batch:
        """The batch that gradients are taken on."""
        return next(iter(self.pair.probes.values()))

    def _make_gradients(self, dtype: str) -> tuple[tuple[float, Leaves], tuple[float, Leaves]]:
        flax, torch = self.runs(dtype)
        loss, gradients = torch.gradients(self.gradient_probe)
        theirs = loss, self.weight_map.to_flax(gradients)
        del gradients
        if self.is_large:
            torch.release()
            hand_back_freed_memory()
        return flax.gradients(self.gradient_probe), theirs

    @property
    def _null(self) -> float:
        return _NULL_IMPURE if self.impurities else _NULL

    @functools.cached_property
    def _seen(self) -> "_Seen":
        """What the gradients in float64 of both frameworks are found to be."""
        (_, flax), (_, torch) = self.gradients("float64")
        scale = gradient_norm(flax)
        null = tuple(
            name
            for name in flax
            if all(np.linalg.norm(side[name]) <= self._null * scale for side in (flax, torch))
        )
        means = tuple(
            (name, axis)
            for name in flax
            if name not in null
            for axis, size in enumerate(flax[name].shape)
            if size > 1
            and all(
                np.linalg.norm(along_ones(side[name], axis))
                <= self._null * np.linalg.norm(side[name])
                for side in (flax, torch)
            )
        )
        return _Seen(frozenset(flax), scale, null, means)

    @property
    def gradient_norm(self) -> float:
        """Of the whole gradient, in float64."""
        return self._seen.norm

    @property
    def null_leaves(self) -> tuple[str, ...]:
        """Leaves whose gradient is zero up to rounding, in float64 and in both frameworks.

        A key bias shifts all scores of a query alike and softmax does not see it. What remains is
        rounding, so relative tests of such a leaf compare noise with noise.
        """
        return self._seen.null_leaves

    @functools.cached_property
    def null_in_training(self) -> tuple[str, ...]:
        """The same, and what only training makes so: a bias before a batch norm is subtracted.

        The statistics of such a norm follow that bias wherever rounding takes it.
        """
        if self._seen.names == self.flax_leaves.keys():  # no statistics that training moves
            return self.null_leaves
        moments = []
        for run, convert in zip(self.runs("float64"), (dict, self.weight_map.to_flax), strict=True):
            trainer = run.trainer(self.steps)
            trainer.step(*self.pair.training_batch(0).inputs)
            moments.append(convert(trainer.moments()[0]))
        found = [
            name
            for name in moments[0]
            if all(
                np.linalg.norm(side[name]) <= self._null * gradient_norm(side) for side in moments
            )
        ]
        if set(found) > set(self.null_leaves):
            found += [name for name in self.flax_leaves if name not in self._seen.names]
        return tuple(dict.fromkeys((*self.null_leaves, *found)))

    @property
    def null_means(self) -> tuple[tuple[str, int], ...]:
        """Leaves, and one axis each, over which the mean of the gradient is zero up to rounding.

        What is added to all channels of the residual stream alike is taken out again by the norms
        that read it; what is added to the scores of all classes alike, by the softmax of the loss.
        """
        return self._seen.null_means

    @property
    def null_names(self) -> str:
        """All of these in words; layers of one kind are named once."""
        groups: dict[str, list[str]] = {}
        for name in self.null_leaves:
            groups.setdefault("", []).append(name)
        for name, axis in self.null_means:
            groups.setdefault(f"the mean over axis {axis} of ", []).append(name)
        parts = []
        for words, names in groups.items():
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            parts.append(words + ", ".join(kinds))
        return "; ".join(parts)
