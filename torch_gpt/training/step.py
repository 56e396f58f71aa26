"""One training step and one evaluation. Read beside flax_gpt/training/step.py."""

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torch_gpt import random
from torch_gpt.training.config import TrainConfig
from torch_gpt.training.loss import IGNORE_INDEX, TokenLoss, cross_entropy
from torch_gpt.training.optimizer import (
    adamw,
    clip_gradients,
    learning_rate,
    loss_scale,
    num_updates,
)
from torch_gpt.training.tasks import NEXT_TOKEN, Batch, Task


@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and its constants."""

    model: nn.Module
    config: TrainConfig
    task: Task
    optimizer: torch.optim.Optimizer
    loss_scale: torch.amp.GradScaler | None
    key: torch.Tensor | None
    step: int

    @classmethod
    def create(
        cls,
        model: nn.Module,
        config: TrainConfig,
        key: torch.Tensor | None = None,
        task: Task = NEXT_TOKEN,
    ) -> "TrainState":
        """Make the state before the first step.

        Args:
            model: with its initial weights.
            config: of the optimizer.
            key: active dropout; step n has its own, folded in. None for none.
            task: what the model is trained to predict.

        Returns:
            The state.

        Raises:
            ValueError: for a compute_dtype with weights that are narrow already.
        """
        narrow = any(x.dtype.itemsize < 4 for x in model.parameters())
        if narrow and config.compute_dtype is not None:
            raise ValueError(
                f"TrainState: 16-bit weights and compute_dtype {config.compute_dtype}. Mixed "
                "precision keeps its weights in float32. Build the model in float32."
            )
        optimizer = adamw(config, model)
        device = next(model.parameters()).device
        scale = loss_scale(device) if config.compute_dtype == "float16" else None
        return cls(model, config, task, optimizer, scale, key, 0)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Loss and gradient of one training step.

    Attributes:
        loss: before the update, smoothing included.
        gradient_norm: of the whole gradient, before clipping.
        applied: False when the gradient was not finite or nothing was scored, which leaves weights
            and optimizer as they were.
    """

    loss: TokenLoss
    gradient_norm: torch.Tensor
    applied: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts; evaluations of parts of a data set add up.

    Attributes:
        loss: without smoothing.
        num_correct: scored tokens whose class had the highest score.
    """

    loss: TokenLoss
    num_correct: torch.Tensor

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.loss + other.loss, self.num_correct + other.num_correct)

    @property
    def accuracy(self) -> torch.Tensor:
        """Share of the scored tokens that were predicted; NaN when there was none."""
        dtype = self.loss.total.dtype
        return self.num_correct.to(dtype) / self.loss.num_tokens.to(dtype)


def train_step(batch: Batch, state: TrainState) -> tuple[StepResult, TrainState]:
    """Update a model once, by the gradient of the mean loss over all scored tokens.

    A gradient that is not finite, or that no token made, is not applied, so that a bad batch costs
    a step and not the run.

    Args:
        batch: its rows are cut into `accumulation_steps` equal parts, run one after the other.
        state: before the step.

    Returns:
        Loss and gradient norm, and the state after the step.

    Raises:
        ValueError: when the rows do not divide into the parts.
    """
    # twin: jax returns new parameters; torch's optimizer changes them where they lie, and the
    # state that goes in is the one that comes out.
    config, scaler = state.config, state.loss_scale
    num_scored = torch.sum(state.task.targets(batch) != IGNORE_INDEX)

    def share_of_mean(part: Batch, index: int):
        """Return what a part adds to the mean loss of the batch, times the loss scale."""
        key = None
        if state.key is not None:
            key = random.fold_in(random.fold_in(state.key, state.step), index)
        logits = _logits(state.model, state.task, part, key, config.compute_dtype)
        loss = cross_entropy(logits, state.task.targets(part), config.label_smoothing)
        share = loss.total / num_scored.to(loss.total.dtype)
        return share if scaler is None else scaler.scale(share), loss

    # twin: jax compiles one part and scans over them all; torch adds up in .grad, one by one.
    state.optimizer.zero_grad()
    losses = []
    for index, part in enumerate(_parts(batch, config.accumulation_steps)):
        share, part_loss = share_of_mean(part, index)
        share.backward()
        losses.append(TokenLoss(part_loss.total.detach(), part_loss.num_tokens))
    if scaler is not None:
        scaler.unscale_(state.optimizer)
    norm = clip_gradients(config, state.model)
    applied = torch.isfinite(norm) & (num_scored > 0)
    if applied:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, num_updates(state.optimizer))
        state.optimizer.step()
    if scaler is not None:
        scaler.update()
    loss = functools.reduce(TokenLoss.__add__, losses)
    return StepResult(loss, norm, applied), dataclasses.replace(state, step=state.step + 1)


def overfit_one_batch(
    batch: Batch, state: TrainState, target: float = 0.01, max_steps: int = 1000
) -> tuple[list[float], TrainState]:
    """Learn one batch by heart, as a correct model and training loop always can.

    Args:
        batch: to learn.
        state: before the first step.
        target: loss below which it ends.
        max_steps: after which it ends, too.

    Returns:
        The loss of every step, the last of them below `target` unless `max_steps` came first, and
        the state.
    """
    losses = []
    while len(losses) < max_steps and not (losses and losses[-1] < target):
        result, state = train_step(batch, state)
        losses.append(float(result.loss.mean))
    return losses, state


def evaluate(model: nn.Module, batches: Iterable[Batch], task: Task = NEXT_TOKEN) -> Evaluation:
    """Sum up loss and hits over all scored tokens of all batches, without dropout.

    Args:
        model: scores the batches.
        batches: of a data set.
        task: what the model was trained to predict.

    Returns:
        The sums.

    Raises:
        ValueError: when there is no batch.
    """
    parts = [_evaluate_batch(model, batch, task) for batch in batches]
    if not parts:
        raise ValueError("evaluate: 0 batches. A loss needs a token. Give at least one batch.")
    return functools.reduce(Evaluation.__add__, parts)


@torch.no_grad()
def _evaluate_batch(model: nn.Module, batch: Batch, task: Task) -> Evaluation:
    logits, targets = task.logits(model, batch, None), task.targets(batch)
    hits = (torch.argmax(logits, dim=-1) == targets) & (targets != IGNORE_INDEX)
    return Evaluation(cross_entropy(logits, targets), torch.sum(hits))


def _parts(batch: Batch, num: int) -> list[Batch]:
    """Cut the rows of a batch into `num` equal parts, in order."""
    rows = batch.tokens_BT.shape[0]
    if rows % num:
        raise ValueError(
            f"train_step: {rows} rows in {num} parts. Parts have the same number of rows. Choose "
            "accumulation_steps that divides the batch."
        )
    size = rows // num
    places = [slice(start, start + size) for start in range(0, rows, size)]
    return [pytree.tree_map(lambda x, place=place: x[place], batch) for place in places]


def _logits(
    model: nn.Module, task: Task, batch: Batch, key: torch.Tensor | None, dtype: str | None
) -> torch.Tensor:
    """Score by the model with its weights cast; gradients flow back to the weights' own dtype."""
    scorer = _Scorer(model, task)
    if dtype is None:
        return scorer(batch, key)
    # twin: nnx.Embed computes in the dtype it was made with; all else follows the weights.
    weights = {name: p.to(getattr(torch, dtype)) for name, p in scorer.named_parameters()}
    return torch.func.functional_call(scorer, weights, (batch, key))


class _Scorer(nn.Module):
    """A model and its task in one module, since only a module can be called with other weights."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch, key: torch.Tensor | None) -> torch.Tensor:
        return self.task.logits(self.model, batch, key)
