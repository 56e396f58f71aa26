"""The session of a live pair: its random weights, and runners of both models."""

import functools

from flax import nnx

from parity.check.held_tables import Table, find_tables
from parity.check.session import Session
from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, cast, neighbours
from parity.frameworks.torch.leaves import to_numpy, torch_leaves
from parity.frameworks.torch.runner import TorchRunner
from parity.pair.pair import Pair
from parity.system.devices import Devices, choose_devices
from parity.system.memory import is_large, on_disk
from parity.weights.modules import module_map
from parity.weights.randomize import randomized
from parity.weights.weight_map import TransplantError, WeightMap, resolve


class PairSession(Session[FlaxRunner, TorchRunner]):
    """Both models of a pair, on devices that are the CPU when None; see `Session`."""

    def __init__(
        self,
        pair: Pair,
        devices: Devices | None = None,
        *,
        dtypes: tuple[str, ...] = ("float64", "float32"),
        seed: int = 0,
        steps: int = 100,
    ):
        super().__init__(pair, dtypes=dtypes, seed=seed, steps=steps)
        self.devices = devices or choose_devices("cpu")

    @functools.cached_property
    def flax_leaves(self) -> Leaves:
        """The weights under test, in float32: initial weights hide forgotten biases and norms."""
        if self.pair.leaves is not None:
            leaves = cast(self.pair.leaves, "float32")
        else:
            own = flax_leaves(self.build_flax())
            kept = {x: leaf for x, leaf in own.items() if self.pair.rules.is_flax_ignored(x)}
            leaves = randomized(own, self.seed) | kept
            leaves |= {name: leaf for table in self.tables for name, leaf in table.flax.items()}
            ties = self.pair.rules.flax_ties
            leaves |= {alias: leaves[x] for alias, x in ties if alias in own and x in own}
        # They are read whenever a model is loaded, and not in between.
        return on_disk(leaves) if is_large(leaves.values()) else leaves

    @functools.cached_property
    def weight_map(self) -> WeightMap:
        """The rules resolved for this pair.

        Raises:
            TransplantError: when they do not fit it.
        """
        unmapped = torch_leaves(self.pair.torch.build("float32"))
        given = self.pair.leaves
        theirs = flax_leaves(self.build_flax()) if given is None else self.flax_leaves
        return resolve(self.pair.rules, unmapped, theirs)

    @functools.cached_property
    def tables(self) -> tuple[Table, ...]:
        """Float constants that both models were built with, which no random numbers replace."""
        if self.pair.leaves is not None or self.pair.pure:
            return ()
        try:
            weight_map = self.weight_map
        except TransplantError:  # the level of the weights reports it
            return ()
        torch, flax = self.pair.torch.build("float32"), self.build_flax()
        exact = {name: to_numpy(x) for name, x in self.pair.torch.constants().items()}
        return tuple(find_tables(weight_map, torch, flax, exact))

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """Torch paths of the modules that both models have, by flax path."""
        flax, torch = self.runs("float64")
        return module_map(torch.module, flax.module, self.weight_map)

    @functools.cached_property
    def torch_leaves(self) -> Leaves:
        """The same weights for torch."""
        unmapped = torch_leaves(self.pair.torch.build("float32")) if self.weight_map.ignored else {}
        kept = {name: unmapped[name] for name in self.weight_map.ignored}
        own = {name: leaf for table in self.tables for name, leaf in table.torch.items()}
        return self.weight_map.to_torch(self.flax_leaves) | kept | own

    @functools.cached_property
    def companions(self) -> "dict[str, PairSession]":
        """Sessions of the tiny pairs that are checked beside this one, in float64."""
        options = {"dtypes": self.dtypes[:1], "seed": self.seed}
        pairs = self.pair.companions.items()
        return {name: PairSession(pair, self.devices, **options) for name, pair in pairs}

    @property
    def model_name(self) -> str:
        """Name of the model itself, whose path is empty."""
        return type(self.runs("float64")[1].module).__name__

    def build_flax(self) -> nnx.Module:
        """Build a float32 model of the flax side on its device."""
        with jax_scope("float32", self.devices.flax):
            return self.pair.flax.build("float32")

    def _make_runs(self, dtype: str) -> tuple[FlaxRunner, TorchRunner]:
        tables = tuple(name for table in self.tables for name in table.flax)
        code = (*self.weight_map.flax_ignored, *tables)
        lifting = {"lift": not self.pair.pure, "code_leaves": code}
        leaves = self.flax_leaves
        if dtype == "float64" and tables:
            leaves = leaves | {x: leaf for table in self.tables for x, leaf in table.exact.items()}
        return (
            FlaxRunner(self.pair.flax, leaves, dtype, self.devices.flax, **lifting),
            self._torch_runner(self.torch_leaves, dtype),
        )

    def perturbed_run(self, dtype: str, seed: int = 0, roundings: int = 1) -> TorchRunner:
        """Return the torch side from weights some roundings away: what rounding does to it."""
        leaves = neighbours(cast(self.torch_leaves, dtype), self.seed + seed, roundings)
        return self._torch_runner(leaves, dtype)

    def perturbed_outputs(
        self, batch: Batch, rounded: str, computed: str, number: int, roundings: int
    ) -> Outputs:
        """See `Session`; of the torch side."""
        seed = self.seed + number
        leaves = neighbours(cast(self.torch_leaves, rounded), seed, roundings)
        run = self.runs(computed)[1].at(leaves)
        return batch.select(run.outputs(batch.perturbed(rounded, seed, roundings)))

    def _torch_runner(self, leaves: Leaves, dtype: str) -> TorchRunner:
        tables = (name for table in self.tables for name in table.torch)
        code = (*self.weight_map.ignored, *tables)
        lifting = {"lift": not self.pair.pure, "code_leaves": code}
        return TorchRunner(self.pair.torch, leaves, dtype, self.devices.torch, **lifting)
