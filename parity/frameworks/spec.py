"""How to build, call and score one model, and the inputs of one call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        inputs: arrays, passed on in this order.
        real: True for output rows that count, over the leading axes; None for all.
    """

    inputs: tuple[np.ndarray, ...]
    real: np.ndarray | None = None

    def select(self, outputs: np.ndarray) -> np.ndarray:
        """The part of an output that counts; all of it if it does not have the axes it should."""
        if self.real is None or outputs.shape[: self.real.ndim] != self.real.shape:
            return outputs
        return outputs[self.real]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One framework's half of a pair, as functions of its module.

    Attributes:
        name: what the report calls this side.
        build: a module of the given dtype name, on the host; its weights will be overwritten.
        forward: (module, *inputs) to the output compared.
        loss: (module, *inputs) to a scalar.
        trainer: a module and the number of steps that its schedule spans to a trainer:
            `step(*inputs)` to the loss before the update, `parameters()` and `moments()` to the
            module's leaves and the optimizer's (first, second, count), the moments to be read
            before the next step; None for a model that is not to be trained.
        decoder: a module to a decoder: `chunks(calls, capacity)` to logits by call, `generate` to
            greedy tokens, and for a pair with `sampling` `sample` to tokens and margins; None for
            a model without a cache.
    """

    name: str
    build: Callable[[str], Any]
    forward: Callable[..., Any]
    loss: Callable[..., Any]
    trainer: Callable[[Any, int], Any] | None = None
    decoder: Callable[[Any], Any] | None = None
