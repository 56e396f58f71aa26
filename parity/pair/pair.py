"""What the harness may ask of a pair of models. Nothing here knows the twins.

The two sides have the same fields and their runs the same methods; what passes between them and the
levels is NumPy. A third-party pair is checked by filling in the fields.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import Batch, ModelSpec
from parity.weights.rules import Rules


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

    flax: ModelSpec
    torch: ModelSpec
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
