"""A language model as the detectors see it: functions on NumPy arrays, in either framework.

Dimension key: B batch, T tokens, S cache slots, N heads, V vocab, G generated tokens.

Every detector asks for some of these functions; one that a model does not offer is None, and the
detectors that need it abstain and say so. `torch_patient` and `flax_patient` fill in what can be
known from outside of a module, and their options the rest.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from parity.frameworks.leaves import Leaves


class Trainer(Protocol):
    """A training under way, on weights of its own."""

    def step(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> float:
        """One update; the loss before it."""

    def parameters(self) -> Leaves:
        """The present weights."""


@dataclasses.dataclass(frozen=True)
class Score:
    """What a loss says of logits.

    Attributes:
        mean: nats per token.
        num_tokens: over how many the mean was taken; None where the loss does not tell.
    """

    mean: float
    num_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A cache from outside. A state is whatever the model's own cache is.

    Attributes:
        empty: rows and capacity to a state that holds nothing.
        read: (state, tokens_BT, counts_B or None) to logits (B, T, V) and the next state. The old
            state must stay as it was, by a copy where the model writes in place.
        select: state and rows to the state of those rows, in that order.
        truncate: state and one length per row to the state cut back to them.
        ragged: whether `read` takes counts.
        bounded: whether a state has a capacity that must not be outgrown.
    """

    empty: Callable[[int, int], Any]
    read: Callable[[Any, np.ndarray, np.ndarray | None], tuple[np.ndarray, Any]]
    select: Callable[[Any, np.ndarray], Any] | None = None
    truncate: Callable[[Any, np.ndarray], Any] | None = None
    ragged: bool = False
    bounded: bool = True


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The constants that a trainer says it trains with, for the reference in NumPy.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patient:
    """A language model under examination.

    Attributes:
        name: what a report calls it.
        framework: torch or flax.
        vocab_size: V.
        context_length: longest sequence.
        dtype: of its weights.
        num_params: how many there are, tied ones once.
        logits: tokens (B, T), and counts of real tokens per row or None, to logits (B, T, V).
        weights: its leaves by name.
        with_weights: leaves to the same model with them; the model itself stays as it is.
        takes_counts: whether `logits` knows padding on the right.
        position_table: name of the leaf with a row per position, if there is one.
        seed: of the probes and of the weights they are asked with.
        trained: whether the weights are trained, so that nothing is asked of fresh ones.
        reach: tokens (T,) to (T, T): how much the logits at t change with the embedding of token s.
        gradients: tokens (B, T) and counts to the gradient of the mean next-token loss by
            parameter; None for a parameter that the loss does not reach.
        score: logits, labels (B, T), counts or None to what the model's own loss says of them.
        evaluate: list of (tokens, counts) to what the model's own evaluation says.
        ignore_index: a label that must not be scored, if the loss knows one.
        trainer: a training by the model's own step, or by a plain AdamW where it has none; the
            argument is the learning rate.
        reference_trainer: the model's own step with everything switched on, and its constants; None
            for a model without a step of its own.
        dropout_losses: losses of the same batch in two training steps that change nothing, with
            dropout active; None for a model without dropout.
        decoder: its cache.
        generate: prompts (B, T), counts or None, number of tokens G, temperature, seed, stop ids to
            tokens (B, G), -1 behind a row's stop.
        keeps_graph: prompts (B, T) to whether the cache behind a few generated tokens keeps an
            autograd graph alive; None in a framework that has no such thing.
        attention: tokens (B, T) and counts or None to weights (B, N, T, S) per layer.
        cast: a dtype name to the same model in it.
        num_programs: lengths of prompts to the number of programs compiled to continue them.
        reference: a model that this one should be, if there is one.
    """

    name: str
    framework: str
    vocab_size: int
    context_length: int
    dtype: str
    num_params: int
    logits: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    weights: Callable[[], Leaves]
    with_weights: Callable[[Mapping[str, np.ndarray]], "Patient"]
    takes_counts: bool = False
    position_table: str | None = None
    seed: int = 0
    trained: bool = False
    reach: Callable[[np.ndarray], np.ndarray] | None = None
    gradients: Callable[..., dict[str, np.ndarray | None]] | None = None
    score: Callable[..., Score] | None = None
    evaluate: Callable[..., Score] | None = None
    ignore_index: int | None = None
    trainer: Callable[[float], Trainer] | None = None
    reference_trainer: Callable[[], tuple[Trainer, AdamW]] | None = None
    dropout_losses: Callable[[np.ndarray], tuple[float, float]] | None = None
    decoder: Decoder | None = None
    generate: Callable[..., np.ndarray] | None = None
    keeps_graph: Callable[[np.ndarray], bool] | None = None
    attention: Callable[..., list[np.ndarray]] | None = None
    cast: Callable[[str], "Patient"] | None = None
    num_programs: Callable[[tuple[int, ...]], int] | None = None
    reference: "Patient | None" = None
