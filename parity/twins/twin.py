"""The handle of a twin: `FlaxTwin` and `TorchTwin` fill in what differs; what passes is NumPy.

Dimension key: B batch, N heads, T tokens, S positions that they see, V vocab, G generated
tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from parity.frameworks.leaves import Leaves, cast
from parity.frameworks.plan import Plan, Readings
from parity.frameworks.protocols import Calls, Trainer
from parity.twins.follow import Follower, script

if TYPE_CHECKING:
    import flax_gpt
    import torch_gpt

    Config = flax_gpt.GPTConfig | torch_gpt.GPTConfig

Constants = Sampling = Mapping[str, Any]  # fields of TrainConfig, and of Sampling
GREEDY: Sampling = {"temperature": 0.0}
# Tokens (B, T), and where there are such, counts (B,) and labels.
Inputs = Sequence[np.ndarray | None]

Array, Cache, Model = Any, Any, Any  # of the twin's framework


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
    def model(self) -> Model:
        """The model with its present weights."""

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


class Twin(Protocol):
    """One of the two GPTs with weights, a dtype and a device.

    Attributes:
        name: of the package.
        framework: flax or torch.
        original: the twin's package.
        package: that of the model: the original, or a changed copy.
        model: the GPT, or a classifier around one, which cannot decode.
        device: of the framework.
    """

    name: str
    framework: str
    original: ModuleType
    package: ModuleType
    model: Model
    device: Any

    @classmethod
    def build(
        cls,
        config: Config,
        device: Any = None,
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

    def leaves(self) -> Leaves:
        """Return every weight under the package's own name."""

    def load(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Overwrite every weight, under the package's own names.

        Raises:
            ValueError: when names, shapes or dtypes are not exactly the model's.
        """

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which arrays are made and the model is called."""

    def package_scope(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the package's own functions are called."""

    def ints(self, x: np.ndarray | Sequence[object] | None) -> Array:
        """Return integers as an array of the framework on the twin's device; None for None."""

    def numpy(self, x: Array) -> np.ndarray:
        """Return an array of the framework on the host."""

    @property
    def ints_name(self) -> str:
        """What makes an array of integers in the framework, by name."""

    def with_definition(self) -> Self:
        """Return the same model with the attention of `attention.py`."""

    def call(
        self, decoder: Any, function: Callable[..., Any], *operands: Array, static: tuple = ()
    ) -> Any:
        """Call one of the package's pure functions on a decoder's model, compiled where it can be.

        Args:
            decoder: of the package.
            function: called with the model, the operands and the static arguments.
            operands: arrays, caches or None; all stay as they were.
            static: other arguments.

        Returns:
            The function's result.
        """

    def forward(self, tokens_BT: Array, cache: Cache, counts_B: Array) -> tuple[Array, Cache]:
        """Return logits (B, T, V) and the longer cache; `cache` stays as it was."""

    def trainer(
        self, constants: Constants, task: str = "next-token", seed: int | None = None
    ) -> TwinTrainer:
        """Return a training of this model, which is the trainer's from now on.

        Args:
            constants: fields of TrainConfig.
            task: next-token, token-class or sequence-class.
            seed: of dropout; None for none.
        """

    # What follows is the same for both: their packages have the same names.

    @property
    def config(self) -> flax_gpt.GPTConfig:
        """Of the model; the packages have the same class of their own."""
        return self.model.config

    def cast(self, dtype: str) -> Self:
        """Return the same model with its weights in another dtype."""
        config = dataclasses.replace(self.config, dtype=dtype)
        other = self.build(config, self.device, package=self.package)
        other.load(cast(self.leaves(), dtype))
        return other

    def logits(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        """Return logits (B, T, V) without a cache."""
        return self.read(None, tokens_BT, counts_B)[0]

    def evaluate(self, batches: Iterable[Inputs], task: str = "next-token") -> dict[str, float]:
        """Return loss, perplexity, accuracy and number of tokens over all batches."""
        with self.package_scope():
            arrays = (self.package.Batch(*map(self.ints, inputs)) for inputs in batches)
            found = self.package.evaluate(self.model, arrays, task_of(self.package, task))
            return {
                "loss": float(found.loss.mean),
                "perplexity": float(found.loss.perplexity),
                "accuracy": float(found.accuracy),
                "tokens": int(found.loss.num_tokens),
            }

    def read(
        self, cache: Cache, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Return logits (B, T, V) and the cache with these tokens; `cache` stays as it was."""
        with self.scope():
            logits_BTV, cache = self.forward(self.ints(tokens_BT), cache, self.ints(counts_B))
            return self.numpy(logits_BTV), cache

    def empty(self, num_rows: int, capacity: int) -> Cache:
        """Return a cache that holds nothing."""

    def select(self, cache: Cache, rows: np.ndarray) -> Cache:
        """Return the cache of these rows, in this order."""
        with self.scope():
            return cache.select(self.ints(rows))

    def truncate(self, cache: Cache, lengths_B: np.ndarray) -> Cache:
        """Return the cache cut back to a length per row."""
        with self.scope():
            return cache.truncate(self.ints(lengths_B))

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Return the logits of each call; see `Decoder`."""
        cache, found = self.empty(len(calls[0][0]), capacity), []
        for tokens_BT, counts_B in calls:
            logits_BTV, cache = self.read(cache, tokens_BT, counts_B)
            found.append(logits_BTV)
        return found

    def follow(self, plan: Plan) -> Readings:
        """Return what the reads of a plan give; see `PlanDecoder`."""
        return self._follower(plan)

    def script(self, plan: Plan, row: int, index: int, history: Sequence[int]) -> str:
        """Return a plan as Python; see `PlanDecoder`."""
        return script(self, plan, row, index, history)

    @functools.cached_property
    def _follower(self) -> Follower:
        return Follower(self)

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
        """Return a continuation of each prompt by the package's `generate`.

        Raises:
            ValueError: for prompts that are empty, unknown or too long.
        """
        package = self.package
        with self.package_scope():
            found = package.generate(
                self.model,
                tokens_BT,
                max_new_tokens,
                counts_B,
                stop_ids,
                use_cache,
                package.Sampling(**sampling),
                package.random.key(seed) if sampling["temperature"] else None,
            )
            tokens_BG, margins_BG = map(self.numpy, (found.tokens_BG, found.margins_BG))
            return Continuation(tokens_BG.astype(np.int32), margins_BG)

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Return greedy tokens; see `Decoder`."""
        return self.write(tokens, max_new_tokens, counts, use_cache=use_cache).tokens_BG

    def sample(
        self,
        tokens: np.ndarray,
        counts: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return drawn tokens and their margins; see `Decoder`."""
        found = self.write(tokens, max_new_tokens, counts, sampling=sampling, seed=seed)
        return found.tokens_BG, found.margins_BG

    def attention_weights(
        self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return the attention weights (B, N, T, S) of every block."""
        with self.scope():
            maps = self.model.attention_maps(self.ints(tokens_BT), self.ints(counts_B))
            return [self.numpy(weights_BNTS) for weights_BNTS in maps]

    def num_compilations(self) -> int:
        """Return how many decoding programs the package has compiled, for all its models."""
        return self.package.Decoder.num_compilations()


class Stream:
    """One text that grows token by token.

    Args:
        twin: whose next tokens are scored.
        ids: the beginning of the text.
        sampling: how tokens are drawn.
        seed: of the draws.
        use_cache: False reads the whole text again for every token.

    Attributes:
        logits_V: of the next token, in float64.
        scores_V: what the next token is the largest of: the logits, or where tokens are drawn the
            filtered logits with noise.
    """

    def __init__(
        self,
        twin: Twin,
        ids: Sequence[int],
        sampling: Sampling = GREEDY,
        seed: int = 0,
        use_cache: bool = True,
    ):
        self._twin, self._package, self._use_cache = twin, twin.package, use_cache
        self._ids, self._num_drawn = list(ids), 0
        with twin.scope():
            self._decoder = self._package.Decoder(twin.model, 1)
            self._sampling = self._package.Sampling(**sampling)
            self._key = self._package.random.key(seed)
            self._prefill()

    def append(self, token: int) -> None:
        """Add a token to the text and score the one after it."""
        self._ids.append(token)
        self._num_drawn += 1
        with self._twin.scope():
            if self._use_cache:
                tokens_1 = self._twin.ints([token])
                logits_1V, self._cache = self._decoder.advance(tokens_1, self._cache)
                self._score(logits_1V)
            else:
                self._prefill()

    def _prefill(self) -> None:
        logits_1V, self._cache = self._decoder.prefill(self._twin.ints([self._ids]))
        self._score(logits_1V)

    def _score(self, logits_1V: Array) -> None:
        scores_1V = logits_1V
        if self._sampling.temperature > 0.0:
            filtered_1V = self._package.filter_logits(logits_1V, self._sampling)
            key = self._package.random.fold_in(self._key, self._num_drawn)
            scores_1V = self._package.random.perturb(key, filtered_1V)
        self.logits_V, self.scores_V = (
            self._twin.numpy(x)[0].astype(np.float64) for x in (logits_1V, scores_1V)
        )
