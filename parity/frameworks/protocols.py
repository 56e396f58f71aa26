"""What the levels of a check ask of a model: a runner, and its trainer and decoder.

Each framework implements these once, and whatever passes through them is NumPy. Nothing here
imports a framework.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.leaves import Arrays, Leaves
from parity.frameworks.plan import Plan, Readings
from parity.frameworks.purity import Purity

Module_co = TypeVar("Module_co", covariant=True)

# Tokens (B, T) and counts (B,) of each of several calls that share a cache.
Calls = Sequence[tuple[np.ndarray, np.ndarray]]
# First and second moments by leaf, and the number of updates; None where it is not counted.
Moments = tuple[Leaves, Leaves, int | None]


class NotCompared(Exception):
    """Something that a check does not compare, and why; a level that raises it abstains."""


class Unusable(ValueError):
    """A model that cannot be checked although it can be called: what it does, and the remedy."""


class Trainer(Protocol):
    """One training of one model, step by step."""

    def step(self, *inputs: Any, **keywords: Any) -> float:
        """Take one optimizer step on arguments of the model's loss; return the loss before it."""

    def parameters(self) -> Leaves:
        """Return the present weights and statistics by leaf."""

    def moments(self) -> Moments:
        """Return the optimizer's moments; empty for an optimizer without them.

        They may share memory with the optimizer: read them before the next step.
        """


class Decoder(Protocol):
    """One model that reads and writes tokens through its cache."""

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Return the logits (B, T, V) of each call, through one cache of `capacity` slots."""

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Return greedy tokens (B, G) after prompts of tokens (B, T) and counts (B,)."""

    def sample(
        self,
        tokens: np.ndarray,
        counts: np.ndarray,
        max_new_tokens: int,
        sampling: Mapping[str, float],
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return drawn tokens and the margins of their choice, (B, G) each, as `generate`.

        `sampling` holds settings such as temperature, by name.
        """


class PlanDecoder(Decoder, Protocol):
    """A decoder whose caches can be used in every way that plans have."""

    def follow(self, plan: Plan) -> Readings:
        """Return the logits (k, V) of each row of each read of a plan."""

    def script(self, plan: Plan, row: int, index: int, history: Sequence[int]) -> str:
        """Return a plan as Python that prints how far a token of its last read is off."""


class Runner(Protocol):
    """One model with weights and a dtype that answers in NumPy, live or from a recording."""

    name: str

    def outputs(self, batch: Batch) -> Outputs:
        """Return the model's output, leaf by leaf."""

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss and its gradient by leaf."""

    def forward_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward pass that are not in float64."""

    def gradient_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward and backward pass that are not in float64."""

    def trainer(self, num_steps: int) -> Trainer:
        """Return a trainer with a copy of the model, for a schedule of `num_steps`."""

    def release(self) -> None:
        """Free the model's memory until it is asked for again."""

    def moved(self) -> Self:
        """Return the same model with the constants that it holds in a narrow type moved.

        Each by half a unit in its last place: what rounding may have done to it.
        """


class LiveRunner(Runner, Protocol[Module_co]):
    """A runner whose model is at hand, so that one can look inside."""

    @property
    def module(self) -> Module_co:
        """The model itself."""

    def leaves(self) -> Leaves:
        """Return the model's weights in its dtype."""

    def at(self, leaves: Arrays) -> Self:
        """Return the same model with other weights; what is compiled stays so."""

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Pass inputs and output of every module in a forward pass to `on_trace`."""

    def backward(self, batch: Batch) -> list[Backward]:
        """Return the gradients of the loss by every module's inputs and output, last call first."""

    def decoder(self) -> Decoder:
        """Return the model's decoder."""

    def decoder_traces(self, call: Callable[[Decoder], object]) -> list[Trace]:
        """Return inputs and output of every module while `call` uses the model's decoder."""
