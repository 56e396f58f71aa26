"""What the harness may ask of a pair of models. Nothing here knows the twins.

The two sides have the same fields and their runs the same methods; what passes between them and the
levels is NumPy. A third-party pair is checked by filling in the fields.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity.leaves import Leaves
from parity.rules import Rules


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
class Side:
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


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models that claim to be one function, and the inputs that put the claim to the test.

    Attributes:
        flax: the Flax NNX side.
        torch: the PyTorch side.
        rules: the weight map.
        probes: named inputs for logits and gradients; the first is the one for gradients.
        training_batch: the batch of a training step, by its number; `loss` takes it too.
        learning_rate: the largest of both trainers, the unit in which single updates are judged.
        prompts: tokens (B, T) and counts (B,) to continue greedily; None without a decoder.
        new_tokens: how many to generate behind each prompt.
        sampling: settings to draw tokens with, as the decoders know them, temperature among them;
            None for a pair that is not to be sampled from.
        sequences: tokens (B, T) and counts (B,) to read in chunks; None without a decoder.
        config: what the report says of the models.
        leaves: the flax side's weights under test; None for random ones, which hide nothing.
        pure: whether a float64 run must be in float64 throughout. False for modules of others,
            which may hold an operation that is not: then float64 says less, and that is said.
    """

    flax: Side
    torch: Side
    rules: Rules
    probes: Mapping[str, Batch]
    training_batch: Callable[[int], Batch]
    learning_rate: float = 1e-3
    prompts: tuple[np.ndarray, np.ndarray] | None = None
    new_tokens: int = 0
    sampling: Mapping[str, Any] | None = None
    sequences: tuple[np.ndarray, np.ndarray] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    leaves: Leaves | None = None
    pure: bool = True
