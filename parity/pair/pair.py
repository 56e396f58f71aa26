"""Two models that claim to be one function.

Nothing here knows the twins: a pair of other models is checked by filling in the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from parity.frameworks.batch import Batch
from parity.frameworks.leaves import Leaves
from parity.frameworks.plan import Limits
from parity.frameworks.spec import ModelSpec
from parity.weights.rules import Rules

if TYPE_CHECKING:
    import jax
    import torch
    from flax import nnx


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models that claim to be one function, and the inputs that put the claim to the test.

    Attributes:
        flax: the Flax NNX model.
        torch: the PyTorch model.
        rules: the weight map.
        probes: named inputs for logits and gradients; gradients are taken on the first.
        training_batch: number of a training step to its inputs, which `loss` takes too.
        learning_rate: the largest of both trainers, in units of which single updates are judged.
        prompts: tokens (B, T) and counts (B,) to continue greedily; None without a decoder.
        new_tokens: tokens to generate after each prompt.
        sampling: settings to draw tokens with, as the decoders take them, temperature among them;
            None for a pair that is not sampled from.
        sequences: tokens (B, T) and counts (B,) to read in chunks; None without a decoder.
        config: of the models, for the report.
        leaves: the Flax model's weights under test; None for random ones, which hide nothing.
        pure: whether a float64 run must be in float64 throughout. False for foreign modules: where
            one is not, float64 proves less, and the report says so.
        half: the type of 16 bits that the modules are in, if they are: bfloat16 or float16.
        frozen: torch's parameters that neither side trains.
        companions: tiny pairs of the same code, by name, with the parts that this one lacks; what
            decodes is checked on them too.
        plans: what plans of cache operations are drawn from, by the name of the model.
    """

    flax: ModelSpec[nnx.Module, jax.Array]
    torch: ModelSpec[torch.nn.Module, torch.Tensor]
    rules: Rules
    probes: Mapping[str, Batch]
    training_batch: Callable[[int], Batch]
    learning_rate: float = 1e-3
    prompts: tuple[np.ndarray, np.ndarray] | None = None
    new_tokens: int = 0
    sampling: Mapping[str, float] | None = None
    sequences: tuple[np.ndarray, np.ndarray] | None = None
    config: Mapping[str, object] = dataclasses.field(default_factory=dict)
    leaves: Leaves | None = None
    pure: bool = True
    half: str | None = None
    frozen: tuple[str, ...] = ()
    companions: Mapping[str, Pair] = dataclasses.field(default_factory=dict)
    plans: Mapping[str, Limits] = dataclasses.field(default_factory=dict)
