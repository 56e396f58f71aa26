"""How to build, call and score one model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from parity.frameworks.protocols import Decoder, Trainer

ModuleT = TypeVar("ModuleT")
ArrayT = TypeVar("ArrayT")
OptimizerT = TypeVar("OptimizerT")


@dataclasses.dataclass(frozen=True)
class ModelSpec(Generic[ModuleT, ArrayT]):
    """How to build, call, train and decode one framework's model.

    Attributes:
        name: of the model in the report.
        build: a dtype's name to a module of it on the host, whose weights will be overwritten.
        forward: (module, *inputs, **keywords) to the output that is compared.
        loss: the same arguments to a scalar.
        trainer: (module, steps that the schedule spans) to a trainer; None for a model that is not
            trained.
        decoder: a module to its decoder; None for a model without a cache.
        constants: arrays of the module that no weight overwrites, such as tables of angles, by
            name: in the type in which it holds them, or in float64 where that could be computed.
    """

    name: str
    build: Callable[[str], ModuleT]
    forward: Callable[..., object]
    loss: Callable[..., ArrayT]
    trainer: Callable[[ModuleT, int], Trainer] | None = None
    decoder: Callable[[ModuleT], Decoder] | None = None
    constants: Callable[[], Mapping[str, ArrayT]] = dict


@dataclasses.dataclass(frozen=True)
class ModuleUse(Generic[ArrayT, OptimizerT]):
    """How one module is called, scored and trained, where the defaults do not fit.

    Attributes:
        call: (module, *inputs, **keywords) to outputs; `module(*inputs, **keywords)` when None.
        loss: the same arguments to a scalar; a fixed random projection of the outputs when None.
        optimizer: for torch a function of parameters to an optimizer, for Flax an optax
            transformation; AdamW with the same constants when None.
        build: builds the module again, so that constants it computes in float32 when it is built
            can be had in float64; where None, its class is called with its own attributes.
    """

    call: Callable[..., object] | None = None
    loss: Callable[..., ArrayT] | None = None
    optimizer: OptimizerT | None = None
    build: Callable[[], object] | None = None


BY_DEFAULT: ModuleUse = ModuleUse()
