"""A module that runs beside one that was recorded, as the levels see them."""

import functools
from typing import NoReturn

from parity.check.session import Session
from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.handle import NAMES, Handle
from parity.frameworks.leaves import Leaves, cast, different_leaves, neighbours
from parity.frameworks.protocols import LiveRunner, Runner
from parity.frameworks.spec import ModelSpec
from parity.golden.file import Golden
from parity.golden.recorded import RecordedRunner, name_of
from parity.pair.pair import Pair
from parity.weights.layouts import Link
from parity.weights.rules import Rules
from parity.weights.weight_map import TransplantError, WeightMap, resolve


class GoldenSession(Session):
    """A module that runs beside one that was recorded.

    The levels see one of them as the Flax model and the other as the torch model. Where both are
    of one framework, and `rules` is None, the module that runs is the first of these, and every
    leaf is its own counterpart.
    """

    def __init__(
        self, golden: Golden, here: Handle, module: object, spec: ModelSpec, rules: Rules | None
    ):
        def not_run(*args: object) -> NoReturn:
            raise ValueError("a golden is not run")

        replay: ModelSpec = ModelSpec(name_of(golden), not_run, not_run, not_run, trainer=not_run)
        self._module_is_flax = rules is None or golden.framework == "torch"
        flax, torch = (spec, replay) if self._module_is_flax else (replay, spec)
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
        self.golden, self._here, self._spec = golden, here, spec
        self._is_alike = rules is None
        self._own = here.initial_leaves(spec, "float64")
        self._code_leaves, self._trained = here.code_leaves(module), here.trained(module)
        if self._is_alike and (problems := different_leaves(golden.weights, self._own)):
            raise ValueError(
                f"golden of {golden.model}: {'; '.join(problems[:5])}. The module is not the one "
                "that was recorded. Mend it or record it again."
            )

    @functools.cached_property
    def weight_map(self) -> WeightMap:
        """The rules resolved for the module and the golden."""
        if self._is_alike:
            links = tuple(Link((name,), (name,)) for name in self._own)
            shapes = {name: leaf.shape for name, leaf in self._own.items()}
            return WeightMap(links, (), (), shapes, shapes)
        both = self.golden.weights, self._own
        torch, flax = both if self._module_is_flax else both[::-1]
        return resolve(self.pair.rules, torch, flax)

    def frozen(self) -> list[str]:
        """Return the module's leaves that the recorded training left alone."""
        try:
            links = self.weight_map.links
        except TransplantError:  # which the level of the weights reports
            return []
        found: list[str] = []
        for link in links:
            own, theirs = link.flax, link.torch
            if not self._module_is_flax:
                own, theirs = theirs, own
            if not self.golden.gradients.keys() & {*theirs}:
                found += self._trained & {*own}
        return found

    @functools.cached_property
    def flax_leaves(self) -> Leaves:
        """The recorded weights, under the names of the Flax model."""
        if self._is_alike or not self._module_is_flax:
            return self.golden.weights
        return self.weight_map.to_flax(self.golden.weights)

    @functools.cached_property
    def runner(self) -> LiveRunner:
        """The module, with the recorded weights."""
        if self._is_alike:
            weights = dict(self.golden.weights)
        elif self._module_is_flax:
            weights = dict(self.flax_leaves)
        else:
            weights = self._own | self.weight_map.to_torch(self.golden.weights)
        # A table that the code computes must come from the code under check.
        weights |= {name: self._own[name] for name in self._code_leaves}
        return self._here.runner(self._spec, weights)

    def restored(self) -> Leaves:
        """Return the module's weights in the names and layouts of the golden."""
        found = self.runner.leaves()
        if self._is_alike:
            return {name: leaf for name, leaf in found.items() if name not in self._code_leaves}
        move = self.weight_map.to_torch if self._module_is_flax else self.weight_map.to_flax
        return move(found)

    def about(self) -> dict[str, object]:
        """Describe both models for the report."""
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

    def perturbed_outputs(
        self, batch: Batch, rounded: str, computed: str, number: int, roundings: int
    ) -> Outputs:
        """See `Session`; of the module that runs."""
        seed = self.golden.seed + number
        run = self.runner.at(neighbours(cast(self.runner.leaves(), rounded), seed, roundings))
        return batch.select(run.outputs(batch.perturbed(rounded, seed, roundings)))

    def _make_runs(self, dtype: str) -> tuple[Runner, Runner]:
        replay = RecordedRunner(self.golden)
        return (self.runner, replay) if self._module_is_flax else (replay, self.runner)
