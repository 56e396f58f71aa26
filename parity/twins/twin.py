"""What a twin's handle offers. `FlaxTwin` and `TorchTwin` implement it; what passes is NumPy.

Dimension key: B batch, N heads, T tokens, S positions that they see, V vocab, G generated
tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import numpy as np

from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Decoder, Trainer

if TYPE_CHECKING:
    import flax_gpt
    import torch_gpt

    Config = flax_gpt.GPTConfig | torch_gpt.GPTConfig

# Fields of TrainConfig, and of Sampling, which has no filter or temperature that is not here.
Constants = Mapping[str, "float | int | bool | str | None"]
Sampling = Mapping[str, "float | int | None"]
GREEDY: Sampling = {"temperature": 0.0}
# Tokens (B, T), and where there are such, counts (B,) and labels.
Inputs = Sequence["np.ndarray | None"]

ModelT = TypeVar("ModelT")
CacheT = TypeVar("CacheT")


def task_of(package: ModuleType, name: str) -> flax_gpt.Task | torch_gpt.Task:
    """Return a package's task: next-token, token-class or sequence-class."""
    return getattr(package, name.upper().replace("-", "_"))


@dataclasses.dataclass(frozen=True)
class Continuation:
    """New tokens of each prompt, (B, G), and the margin by which each was chosen."""

    tokens_BG: np.ndarray
    margins_BG: np.ndarray


class TwinTrainer(Trainer, Protocol):
    """A training of a twin that can be saved, restored and judged on other text.

    Attributes:
        gradient_norm: of the last step, before clipping.
        applied: whether the last step's gradient was finite, and so applied.
    """

    gradient_norm: float
    applied: bool

    @property
    def loss_scale(self) -> float | None:
        """What float16 multiplies the loss by; None in other dtypes."""

    def evaluate(self, batches: Iterable[Inputs]) -> dict[str, float]:
        """Return loss, perplexity, accuracy and number of tokens over all batches."""

    def save(self) -> Leaves:
        """Return everything that the next step depends on; see parity/twins/state.py."""

    def restore(self, saved: Leaves) -> None:
        """Go on from what `save` returned.

        Raises:
            ValueError: when names, shapes or dtypes are not exactly this trainer's.
        """


class Stream(Protocol):
    """One text that grows token by token.

    Attributes:
        logits_V: of the next token, in float64.
        scores_V: what the next token is the largest of: the logits, or where tokens are drawn the
            filtered logits with noise.
    """

    logits_V: np.ndarray
    scores_V: np.ndarray

    def append(self, token: int) -> None:
        """Add a token to the text and score the one after it."""


class Twin(Decoder, Protocol[ModelT, CacheT]):
    """One of the two GPTs with weights, a dtype and a device.

    Attributes:
        name: of the package.
        framework: flax or torch.
        original: the twin's package.
        package: that of the model: the original, or a changed copy.
        model: the GPT, or a classifier around one, which cannot decode.
    """

    name: str
    framework: str
    original: ModuleType
    package: ModuleType
    model: ModelT

    @classmethod
    def build(
        cls,
        config: Config,
        device: object | None = None,
        *,
        seed: int | None = None,
        leaves: Iterable[tuple[str, np.ndarray]] | None = None,
        package: ModuleType | None = None,
    ) -> Self:
        """Build a GPT.

        Args:
            config: of either package.
            device: of the framework; its CPU when None.
            seed: of initial weights; zeros when None.
            leaves: weights instead, under flax_gpt's names and in the config's dtype. They are read
                one after the other, so that they need not all be in memory.
            package: a changed copy of the twin's package; the package itself when None.

        Raises:
            ValueError: when the leaves are not exactly the model's.
        """

    def copy(self) -> Self:
        """Return the same model with arrays of its own."""

    def cast(self, dtype: str) -> Self:
        """Return the same model with its weights in another dtype."""

    def leaves(self) -> Leaves:
        """Return every weight under the package's own name."""

    def load(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Overwrite every weight, under the package's own names.

        Raises:
            ValueError: when names, shapes or dtypes are not exactly the model's.
        """

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the twin's own functions compute as the handle does."""

    def logits(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        """Return logits (B, T, V) without a cache."""

    def evaluate(self, batches: Iterable[Inputs], task: str = "next-token") -> dict[str, float]:
        """Return loss, perplexity, accuracy and number of tokens over all batches."""

    def trainer(
        self, constants: Constants, task: str = "next-token", seed: int | None = None
    ) -> TwinTrainer:
        """Return a training of this model, which is the trainer's from now on.

        Args:
            constants: fields of TrainConfig.
            task: next-token, token-class or sequence-class.
            seed: of dropout; None for none.
        """

    def empty(self, num_rows: int, capacity: int) -> CacheT:
        """Return a cache that holds nothing."""

    def read(
        self, cache: CacheT, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, CacheT]:
        """Return logits (B, T, V) and the cache with these tokens; `cache` stays as it was."""

    def select(self, cache: CacheT, rows: np.ndarray) -> CacheT:
        """Return the cache of these rows, in this order."""

    def truncate(self, cache: CacheT, lengths_B: np.ndarray) -> CacheT:
        """Return the cache cut back to a length per row."""

    def write(
        self,
        tokens_BT: np.ndarray,
        max_new_tokens: int,
        counts_B: np.ndarray | None = None,
        *,
        use_cache: bool = True,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> Continuation:
        """Continue each prompt by the package's `generate`.

        Raises:
            ValueError: for prompts that are empty, unknown or too long.
        """

    def stream(
        self, ids: Sequence[int], sampling: Sampling = GREEDY, seed: int = 0, use_cache: bool = True
    ) -> Stream:
        """Return a text that begins with `ids`, to be continued token by token."""

    def attention_weights(
        self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return the attention weights (B, N, T, S) of every block."""

    def num_compilations(self) -> int:
        """Return how many decoding programs the package has compiled, for all its models."""
