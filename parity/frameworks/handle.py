"""All that one framework offers, imported when it is asked for and not before.

What works with a single framework, as goldens do, asks here, so that the other need not exist.
"""

import importlib
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeVar, cast

from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.leaves import Arrays, Leaves
from parity.frameworks.protocols import LiveRunner
from parity.frameworks.spec import ModelSpec, ModuleUse

NAMES = "flax", "torch"

Built = TypeVar("Built")


class Handle(Protocol):
    """One framework: `flax/module.py` or `torch/module.py`.

    Attributes:
        NAME: flax or torch.
        MODULE: the class of its modules.
    """

    NAME: str
    MODULE: type

    def spec(
        self,
        module: object,
        use: ModuleUse,
        scored: Sequence[str] | None = None,
        frozen: Collection[str] = (),
    ) -> ModelSpec:
        """Return the spec of a module.

        Its default loss reads these leaves of its output, and training leaves frozen ones alone.
        """

    def trained(self, module: object) -> set[str]:
        """Return the names of the leaves that training moves by their gradient."""

    def prepared(self, module: Built, use: ModuleUse, batch: Batch) -> Built:
        """Return a module that can be checked, a copy where parts are not built yet."""

    def tried(self, spec: ModelSpec, batch: Batch) -> tuple[Outputs, set[str]]:
        """Return an output of the shapes and types of a model's, or raise what it raises.

        And the paths of the leaves in it that are arrays of the framework.
        """

    def seeded(self, seed: int, build: Callable[[], Built]) -> Built:
        """Return what a function builds, with the framework's own generator at a seed."""

    def initial_leaves(self, spec: ModelSpec, dtype: str) -> Leaves:
        """Return the weights that a model is built with, on the CPU."""

    def code_leaves(self, module: object) -> tuple[str, ...]:
        """Name the leaves that belong to the code, such as masks and tables of angles."""

    def runner(self, spec: ModelSpec, weights: Arrays) -> LiveRunner:
        """Return a runner in float64 on the CPU."""

    def learning_rate(self, module: object, optimizer: object) -> float:
        """Return the largest learning rate of an optimizer, or of the default where it is None."""


def handle(name: str) -> Handle:
    """Return a framework, which is imported for it and must be installed."""
    try:
        return cast(Handle, importlib.import_module(f"parity.frameworks.{name}.module"))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: {error}. The module under check runs in its framework. Install it."
        ) from error


def handle_of(module: object) -> Handle:
    """Return the framework that a module belongs to."""
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    for name in NAMES:
        if name in packages and isinstance(module, (found := handle(name)).MODULE):
            return found
    raise ValueError(
        f"{type(module).__name__}: no module. A golden is of a torch.nn.Module or a "
        "flax.nnx.Module. Give one of these."
    )
