"""One training step and one evaluation. Read beside torch_gpt/training/step.py."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flax_gpt import random
from flax_gpt.training.config import TrainConfig
from flax_gpt.training.loss import IGNORE_INDEX, TokenLoss, cross_entropy
from flax_gpt.training.optimizer import LossScale, adamw, clip_gradients
from flax_gpt.training.tasks import NEXT_TOKEN, Batch, Task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and its constants."""

    graphdef: nnx.GraphDef = dataclasses.field(metadata=dict(static=True))
    config: TrainConfig = dataclasses.field(metadata=dict(static=True))
    task: Task = dataclasses.field(metadata=dict(static=True))
    parameters: nnx.State
    optimizer: Any
    loss_scale: LossScale | None
    key: jax.Array | None
    step: jax.Array

    @classmethod
    def create(
        cls,
        model: nnx.Module,
        config: TrainConfig,
        key: jax.Array | None = None,
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
        graphdef, parameters = nnx.split(model)
        narrow = any(x.dtype.itemsize < 4 for x in jax.tree.leaves(parameters))
        if narrow and config.compute_dtype is not None:
            raise ValueError(
                f"TrainState: 16-bit weights and compute_dtype {config.compute_dtype}. Mixed "
                "precision keeps its weights in float32. Build the model in float32."
            )
        optimizer = adamw(config).init(parameters)
        scale = LossScale.create() if config.compute_dtype == "float16" else None
        step = jnp.zeros((), jnp.int32)
        return cls(graphdef, config, task, parameters, optimizer, scale, key, step)

    @property
    def model(self) -> nnx.Module:
        """The model with its present weights."""
        return nnx.merge(self.graphdef, self.parameters)


@jax.tree_util.register_dataclass
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
    gradient_norm: jax.Array
    applied: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts; evaluations of parts of a data set add up.

    Attributes:
        loss: without smoothing.
        num_correct: scored tokens whose class had the highest score.
    """

    loss: TokenLoss
    num_correct: jax.Array

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(self.loss + other.loss, self.num_correct + other.num_correct)

    @property
    def accuracy(self) -> jax.Array:
        """Share of the scored tokens that were predicted; NaN when there was none."""
        dtype = self.loss.total.dtype
        return self.num_correct.astype(dtype) / self.loss.num_tokens.astype(dtype)


@jax.jit
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
    config = state.config
    num_scored = jnp.sum(state.task.targets(batch) != IGNORE_INDEX)
    unit = 1.0 if state.loss_scale is None else state.loss_scale.scale

    def share_of_mean(parameters: nnx.State, part: Batch, index: jax.Array):
        """Return what a part adds to the mean loss of the batch, times the loss scale."""
        key = None
        if state.key is not None:
            key = random.fold_in(random.fold_in(state.key, state.step), index)
        model = _in_compute_dtype(state.graphdef, parameters, config.compute_dtype)
        logits = state.task.logits(model, part, key)
        loss = cross_entropy(logits, state.task.targets(part), config.label_smoothing)
        return loss.total / num_scored.astype(loss.total.dtype) * unit, loss

    def add_part(gradients: nnx.State, item: tuple[jax.Array, Batch]):
        index, part = item
        more, loss = jax.grad(share_of_mean, has_aux=True)(state.parameters, part, index)
        return jax.tree.map(jnp.add, gradients, more), loss

    # twin: jax compiles one part and scans over them all; torch adds up in .grad, one by one.
    parts = jnp.arange(config.accumulation_steps), _parts(batch, config.accumulation_steps)
    gradients = jax.tree.map(jnp.zeros_like, state.parameters)
    gradients, losses = jax.lax.scan(add_part, gradients, parts)
    loss = jax.tree.map(jnp.sum, losses)
    gradients = jax.tree.map(lambda g: g / unit, gradients)
    finite = functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients))
    )
    gradients, norm = clip_gradients(config, gradients)
    applied = jnp.isfinite(norm) & (num_scored > 0)
    updates, optimizer = adamw(config).update(gradients, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    kept = state.parameters, state.optimizer
    parameters, optimizer = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old), (parameters, optimizer), kept
    )
    scale = None if state.loss_scale is None else state.loss_scale.update(finite)
    state = dataclasses.replace(
        state,
        parameters=parameters,
        optimizer=optimizer,
        loss_scale=scale,
        step=state.step + 1,
    )
    return StepResult(loss, norm, applied), state


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


def evaluate(model: nnx.Module, batches: Iterable[Batch], task: Task = NEXT_TOKEN) -> Evaluation:
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
    graphdef, parameters = nnx.split(model)
    parts = [_evaluate_batch(graphdef, parameters, batch, task) for batch in batches]
    if not parts:
        raise ValueError("evaluate: 0 batches. A loss needs a token. Give at least one batch.")
    return functools.reduce(Evaluation.__add__, parts)


@functools.partial(jax.jit, static_argnames=("graphdef", "task"))
def _evaluate_batch(
    graphdef: nnx.GraphDef, parameters: nnx.State, batch: Batch, task: Task
) -> Evaluation:
    logits, targets = task.logits(nnx.merge(graphdef, parameters), batch, None), task.targets(batch)
    hits = (jnp.argmax(logits, axis=-1) == targets) & (targets != IGNORE_INDEX)
    return Evaluation(cross_entropy(logits, targets), jnp.sum(hits))


def _parts(batch: Batch, num: int) -> Batch:
    """Cut the rows of a batch into `num` equal parts, in order, along a new first axis."""
    rows = batch.tokens_BT.shape[0]
    if rows % num:
        raise ValueError(
            f"train_step: {rows} rows in {num} parts. Parts have the same number of rows. Choose "
            "accumulation_steps that divides the batch."
        )
    return jax.tree.map(lambda x: x.reshape(num, rows // num, *x.shape[1:]), batch)


def _in_compute_dtype(
    graphdef: nnx.GraphDef, parameters: nnx.State, dtype: str | None
) -> nnx.Module:
    """Return the model with its weights cast; gradients flow back to the weights' own dtype."""
    if dtype is None:
        return nnx.merge(graphdef, parameters)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), parameters))
    # twin: nnx.Embed computes in the dtype it was made with; all else follows the weights.
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed):
            module.dtype = jnp.dtype(dtype)
    return model
