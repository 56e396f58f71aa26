"""Tasks of training: a model's scores, and the class that each of them should name.

Read beside torch_gpt/training/tasks.py.

Dimension key: B batch, T tokens, C classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_gpt.model import GPT
from flax_gpt.training.loss import IGNORE_INDEX, next_token_targets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays that one training step reads.

    Attributes:
        tokens_BT: ids.
        counts_B: real tokens per row, the rest is padding on the right; None for T.
        labels: classes by token (B, T) or by row (B,), IGNORE_INDEX where there is nothing to
            score; None for a language model, whose labels are its tokens.
    """

    tokens_BT: jax.Array
    counts_B: jax.Array | None = None
    labels: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Two functions that turn a model and a batch into a loss.

    Attributes:
        logits: (model, batch, dropout key) to scores (..., C).
        targets: batch to classes (...), IGNORE_INDEX where a score does not count.
    """

    logits: Callable[[Any, Batch, jax.Array | None], jax.Array]
    targets: Callable[[Batch], jax.Array]


def _next_token_logits(model: GPT, batch: Batch, key: jax.Array | None) -> jax.Array:
    return model(batch.tokens_BT, counts_B=batch.counts_B, key=key)[0][:, :-1]


def _next_token_targets(batch: Batch) -> jax.Array:
    labels = batch.tokens_BT if batch.labels is None else batch.labels
    return next_token_targets(labels, batch.counts_B)


def _class_logits(
    model: Callable[..., jax.Array], batch: Batch, key: jax.Array | None
) -> jax.Array:
    return model(batch.tokens_BT, batch.counts_B, key)


def _token_targets(batch: Batch) -> jax.Array:
    assert batch.labels is not None
    if batch.counts_B is None:
        return batch.labels
    real_BT = jnp.arange(batch.labels.shape[1])[None, :] < batch.counts_B[:, None]
    return jnp.where(real_BT, batch.labels, IGNORE_INDEX)


def _sequence_targets(batch: Batch) -> jax.Array:
    assert batch.labels is not None
    if batch.counts_B is None:
        return batch.labels
    return jnp.where(batch.counts_B > 0, batch.labels, IGNORE_INDEX)


NEXT_TOKEN = Task(_next_token_logits, _next_token_targets)
TOKEN_CLASS = Task(_class_logits, _token_targets)
SEQUENCE_CLASS = Task(_class_logits, _sequence_targets)
