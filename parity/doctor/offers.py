"""What more a language model may offer; the questions that need it abstain on models without it.

Dimension key: B batch, T tokens, S cache slots, N heads, V vocab, G generated tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

from parity.doctor.model import AdamW, Array, Counts, LanguageModel, Score
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Trainer

Cache = Any  # whatever the model's own cache is


class NoGradient(Exception):
    """A loss of which nothing can be derived: it is detached, or computed without a graph."""

    def __init__(self) -> None:
        super().__init__("No gradient comes out of the model.")


@runtime_checkable
class CanTrain(LanguageModel, Protocol):
    """A model that can be differentiated and trained."""

    def gradients(self, tokens_BT: Array, counts_B: Counts = None) -> Leaves:
        """Return the gradient of the mean next-token loss by parameter, zeros where it has none."""

    def reach(self, tokens_T: Array) -> Array | None:
        """Return (T, T): the norm of the gradient of the logits at t by the embedding of token s.

        None where no embedding layer is called with the tokens themselves.
        """

    def trainer(self, rate: float) -> Trainer:
        """Start a training by its own step at this learning rate; by AdamW if it has no step."""

    def dropout_losses(self, tokens_BT: Array) -> tuple[float, float] | None:
        """Return the losses of two training steps with dropout that change no weight.

        None for a model without dropout.
        """


@runtime_checkable
class HasOwnStep(CanTrain, Protocol):
    """A model with a training step of its own."""

    def reference_trainer(self) -> tuple[Trainer, AdamW]:
        """Start its training with every option switched on; return the constants too."""


@runtime_checkable
class CanEvaluate(LanguageModel, Protocol):
    """A model with an evaluation of its own."""

    def evaluate(self, batches: Sequence[tuple[Array, Counts]]) -> Score:
        """Return the loss over all (tokens, counts)."""


@runtime_checkable
class CanCast(LanguageModel, Protocol):
    """A model that runs in more than one type."""

    def cast(self, dtype: str) -> Self:
        """Return the same model in another type."""


class Decoder(Protocol):
    """A cache from outside; it may also offer `Selects` and `Truncates`."""

    def empty(self, num_rows: int, capacity: int) -> Cache:
        """Return a cache that holds nothing."""

    def read(self, cache: Cache, tokens_BT: Array, counts_B: Counts = None) -> tuple[Array, Cache]:
        """Return logits (B, T, V) and the longer cache; `cache` must stay as it was."""


@runtime_checkable
class Selects(Protocol):
    """A decoder that can reorder its cache."""

    def select(self, cache: Cache, rows: Array) -> Cache:
        """Return the cache of these rows, in this order."""


@runtime_checkable
class Truncates(Protocol):
    """A decoder that can cut its cache back."""

    def truncate(self, cache: Cache, lengths_B: Array) -> Cache:
        """Return the cache cut back to a length per row."""


@runtime_checkable
class CanDecode(LanguageModel, Protocol):
    """A model with a cache.

    Attributes:
        ragged: whether its decoder takes counts.
        bounded: whether a cache has a capacity that must not be outgrown.
    """

    ragged: bool
    bounded: bool

    @property
    def decoder(self) -> Decoder:
        """What reads tokens through the cache."""
        ...


@runtime_checkable
class CanGenerate(LanguageModel, Protocol):
    """A model with a generation of its own."""

    def generate(
        self,
        tokens_BT: Array,
        num_tokens: int,
        *,
        counts_B: Counts = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> Array:
        """Return new tokens (B, G) after each prompt, -1 after a row's stop."""


@runtime_checkable
class CanKeepGraph(LanguageModel, Protocol):
    """A model whose framework has autograd graphs."""

    def keeps_graph(self, tokens_BT: Array) -> bool:
        """Whether the cache after a few generated tokens keeps an autograd graph alive."""


@runtime_checkable
class ShowsAttention(LanguageModel, Protocol):
    """A model that shows its attention weights."""

    def attention(self, tokens_BT: Array, counts_B: Counts = None) -> list[Array]:
        """Return weights (B, N, T, S) per layer; none where a model keeps none."""


@runtime_checkable
class Compiles(LanguageModel, Protocol):
    """A model that knows how often it was compiled."""

    def num_programs(self, lengths: tuple[int, ...]) -> int:
        """Return the number of programs compiled to continue prompts of these lengths."""


# What a model that does not satisfy a protocol lacks.
NAMES: dict[type, str] = {
    CanTrain: "training",
    HasOwnStep: "training step of its own",
    CanCast: "other types",
    CanDecode: "cache",
    CanGenerate: "generation",
    CanKeepGraph: "autograd graph",
    ShowsAttention: "attention weights",
    Compiles: "count of compiled programs",
}
