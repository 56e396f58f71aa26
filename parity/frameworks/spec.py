"""How to build, call and score one model, and the inputs of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import numpy as np

if TYPE_CHECKING:
    from parity.frameworks.protocols import Decoder, Trainer

ModuleT = TypeVar("ModuleT")
ArrayT = TypeVar("ArrayT")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        inputs: arrays, in the order of the arguments.
        real: True where an element of the output counts, over the leading axes; None for all.
    """

    inputs: tuple[np.ndarray, ...]
    real: np.ndarray | None = None

    def select(self, outputs: np.ndarray) -> np.ndarray:
        """Return what counts of an output; all of it if it lacks the axes of `real`."""
        if self.real is None or outputs.shape[: self.real.ndim] != self.real.shape:
            return outputs
        return outputs[self.real]


@dataclasses.dataclass(frozen=True)
class ModelSpec(Generic[ModuleT, ArrayT]):
    """How to build, call, train and decode one framework's model.

    Attributes:
        name: of the model in the report.
        build: a dtype's name to a module of it on the host, whose weights will be overwritten.
        forward: (module, *inputs) to the output that is compared.
        loss: (module, *inputs) to a scalar.
        trainer: (module, steps that the schedule spans) to a trainer; None for a model that is not
            trained.
        decoder: a module to its decoder; None for a model without a cache.
    """

    name: str
    build: Callable[[str], ModuleT]
    forward: Callable[..., ArrayT]
    loss: Callable[..., ArrayT]
    trainer: Callable[[ModuleT, int], Trainer] | None = None
    decoder: Callable[[ModuleT], Decoder] | None = None


class SpecOptions(TypedDict, total=False):
    """How a module is called, scored and trained, where a user says so.

    Attributes:
        call: (module, *inputs) to outputs; `module(*inputs)` by default.
        loss: (module, *inputs) to a scalar; the outputs times fixed random numbers by default.
        optimizer: for torch a function of the parameters, for Flax an optax transformation; AdamW
            by default.
    """

    call: Callable[..., object] | None
    loss: Callable[..., Any] | None
    optimizer: Any
