"""A language model as the questions see it: methods on NumPy arrays, in either framework.

Dimension key: B batch, T tokens, V vocab.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from parity.frameworks.leaves import Leaves

Array = np.ndarray
Counts = np.ndarray | None  # real tokens per row; None for all
Loss = Any  # of a loss function: a mean, or a total and a number of tokens
Output = Any  # of a call of a module


@dataclasses.dataclass(frozen=True)
class Score:
    """A loss over a batch.

    Attributes:
        mean: nats per token.
        num_tokens: number of tokens in the mean; None where the loss does not say.
    """

    mean: float
    num_tokens: int | None = None

    @classmethod
    def of(cls, loss: Loss) -> "Score":
        """Read what a loss function returns."""
        if not isinstance(loss, tuple):
            return cls(float(loss))
        total, number = (float(x) for x in loss)
        return cls(total / number if number else float("nan"), int(number))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The constants that a trainer claims to train with, for the reference in NumPy.

    Attributes:
        rates: the learning rate of each update, from the first.
        decays: whether the leaf of a name decays.
    """

    rates: tuple[float, ...]
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float | None
    decays: Callable[[str], bool]


@runtime_checkable
class LanguageModel(Protocol):
    """A language model under examination.

    Attributes:
        name: of the model in a report.
        framework: torch or flax.
        vocab_size: V.
        context_length: longest sequence.
        takes_counts: whether `logits` respects padding on the right.
        ignore_index: a label that its loss must not score, if the loss has one.
        pad_id: an id that its config calls padding, which texts do not hold.
        seed: of the probes and of the weights that they are asked with.
        trained: whether the weights are trained, so that nothing is asked of fresh ones.
        reference: a model that this one should equal, if there is one.
    """

    name: str
    framework: str
    vocab_size: int
    context_length: int
    takes_counts: bool = False
    ignore_index: int | None = None
    pad_id: int | None = None
    seed: int = 0
    trained: bool = False
    reference: "LanguageModel | None" = None

    @property
    def position_table(self) -> str | None:
        """Name of the leaf with a row per position, if there is one."""
        return None

    def declares(self) -> str:
        """Return the name of a published class that this model is; empty for another's code."""
        return ""

    def trained_names(self) -> frozenset[str]:
        """Return names of the leaves that training changes; others are constants of the program."""
        return frozenset(self.weights())

    def tables(self) -> frozenset[str]:
        """Return names of the leaves whose rows are looked up, one at a time."""
        return frozenset()

    def is_recurrent(self) -> bool:
        """Return whether layers of it read a sequence step by step, with a state."""
        return False

    @property
    def dtype(self) -> str:
        """Name of the type that it computes in."""
        ...

    @property
    def num_params(self) -> int:
        """Number of its parameters, tied ones once."""
        ...

    def logits(self, tokens_BT: Array, counts_B: Counts = None) -> Array:
        """Return logits (B, T, V)."""
        ...

    def weights(self) -> Leaves:
        """Return its leaves by name."""
        ...

    def with_weights(self, leaves: Mapping[str, Array]) -> Self:
        """Return the same model with other leaves; this one stays as it is."""
        ...

    def score(self, logits_BTV: Array, labels_BT: Array, counts_B: Counts = None) -> Score | None:
        """Return its own loss of these logits; None for a model without one."""
        return None
