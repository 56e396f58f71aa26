"""One training step and one evaluation. Read beside flax_gpt/train.py.

Dimension key: B batch, T tokens.
"""

import dataclasses
from collections.abc import Iterable

import torch

from torch_gpt.config import TrainConfig
from torch_gpt.loss import TokenLoss, next_token_loss
from torch_gpt.model import GPT
from torch_gpt.optimizer import adamw


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    model: GPT
    config: TrainConfig
    optimizer: torch.optim.Optimizer
    step: int

    @classmethod
    def create(cls, model: GPT, config: TrainConfig) -> "TrainState":
        """The state before the first step."""
        return cls(model, config, adamw(config, model.parameters()), 0)


def train_step(
    tokens_BT: torch.Tensor,
    state: TrainState,
    counts_B: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
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
    state.optimizer.zero_grad()
    logits_BTV, _ = state.model(tokens_BT, counts_B=counts_B, key=key)
    loss = next_token_loss(logits_BTV, tokens_BT, counts_B)
    loss.mean.backward()
    state.optimizer.step()
    loss = TokenLoss(loss.total.detach(), loss.num_tokens)
    return loss, dataclasses.replace(state, step=state.step + 1)


def evaluate(model: GPT, batches: Iterable[torch.Tensor]) -> TokenLoss:
    """The loss over all tokens of all batches, each (B, T) and without padding.

    Raises:
        ValueError: when there is no batch.
    """
    with torch.no_grad():
        losses = [next_token_loss(model(tokens_BT)[0], tokens_BT) for tokens_BT in batches]
    if not losses:
        raise ValueError("evaluate: 0 batches. A loss needs a token. Give at least one batch.")
    return sum(losses[1:], start=losses[0])
