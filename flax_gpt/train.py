"""One training step and one evaluation. Read beside torch_gpt/train.py.

Dimension key: B batch, T tokens.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flax_gpt.config import TrainConfig
from flax_gpt.loss import TokenLoss, next_token_loss
from flax_gpt.model import GPT
from flax_gpt.optimizer import adamw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    graphdef: nnx.GraphDef = dataclasses.field(metadata=dict(static=True))
    config: TrainConfig = dataclasses.field(metadata=dict(static=True))
    parameters: nnx.State
    optimizer: Any
    step: jax.Array

    @classmethod
    def create(cls, model: GPT, config: TrainConfig) -> "TrainState":
        """The state before the first step."""
        graphdef, parameters = nnx.split(model)
        optimizer = adamw(config).init(parameters)
        return cls(graphdef, config, parameters, optimizer, jnp.zeros((), jnp.int32))

    @property
    def model(self) -> GPT:
        """The model with its present weights."""
        return nnx.merge(self.graphdef, self.parameters)


@jax.jit
def train_step(
    tokens_BT: jax.Array,
    state: TrainState,
    counts_B: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[TokenLoss, TrainState]:
    """One gradient of the mean loss, one AdamW update.

    Args:
        tokens_BT: ids, also the labels.
        state: before the step.
        counts_B: real tokens per row; None for T.
        key: active dropout; None for none.

    Returns:
        The loss before the update, and the state after it.
    """

    # twin: jax returns new parameters; torch's optimizer changes them where they lie, and the
    # state that goes in is the one that comes out.
    def mean_loss(parameters):
        logits_BTV, _ = nnx.merge(state.graphdef, parameters)(tokens_BT, counts_B=counts_B, key=key)
        loss = next_token_loss(logits_BTV, tokens_BT, counts_B)
        return loss.mean, loss

    gradients, loss = jax.grad(mean_loss, has_aux=True)(state.parameters)
    updates, optimizer = adamw(state.config).update(gradients, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    return loss, dataclasses.replace(
        state, parameters=parameters, optimizer=optimizer, step=state.step + 1
    )


def evaluate(model: GPT, batches: Iterable[jax.Array]) -> TokenLoss:
    """The loss over all tokens of all batches, each (B, T) and without padding.

    Raises:
        ValueError: when there is no batch.
    """
    losses = [next_token_loss(model(tokens_BT)[0], tokens_BT) for tokens_BT in batches]
    if not losses:
        raise ValueError("evaluate: 0 batches. A loss needs a token. Give at least one batch.")
    return sum(losses[1:], start=losses[0])
