"""Cross entropy, with the shift in one place and every token counted.

Read beside torch_gpt/training/loss.py.

Dimension key: B batch, T tokens, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp

IGNORE_INDEX = -100  # a label that is not scored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """A sum over scored tokens and their number. Sums add up across batches; means do not.

    Attributes:
        total: sum of cross entropies, in nats.
        num_tokens: how many tokens were scored; of whole sequences, how many sequences.
    """

    total: jax.Array
    num_tokens: jax.Array

    def __add__(self, other: "TokenLoss") -> "TokenLoss":
        return TokenLoss(self.total + other.total, self.num_tokens + other.num_tokens)

    @property
    def mean(self) -> jax.Array:
        """Nats per scored token; NaN when there was none."""
        return self.total / self.num_tokens.astype(self.total.dtype)

    @property
    def perplexity(self) -> jax.Array:
        """The exponential of the mean over all tokens, never a mean of perplexities."""
        return jnp.exp(self.mean)


def next_token_loss(
    logits_BTV: jax.Array,
    labels_BT: jax.Array,
    counts_B: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> TokenLoss:
    """Score logits at t against the label at t + 1, inside each row.

    The last position of a row has nothing to predict and the first label is never predicted.

    Args:
        logits_BTV: from the model, on the same tokens.
        labels_BT: the tokens, with IGNORE_INDEX where a token must not be scored.
        counts_B: real tokens per row, the rest is padding on the right; None for T.
        label_smoothing: see `cross_entropy`.

    Returns:
        The sum over all scored tokens, and their number.
    """
    targets = next_token_targets(labels_BT, counts_B)
    return cross_entropy(logits_BTV[:, :-1], targets, label_smoothing)


def next_token_targets(labels_BT: jax.Array, counts_B: jax.Array | None = None) -> jax.Array:
    """Return what the logits at t must name: the label at t + 1, shape (B, T - 1).

    The shift is here and nowhere else: labels are the tokens themselves, not shifted. Padding
    becomes IGNORE_INDEX.
    """
    if counts_B is not None:
        steps_1T = jnp.arange(labels_BT.shape[1])[None, :]
        labels_BT = jnp.where(steps_1T < counts_B[:, None], labels_BT, IGNORE_INDEX)
    return labels_BT[:, 1:]


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> TokenLoss:
    """Sum the cross entropy of every target but IGNORE_INDEX, in float32 or wider.

    Args:
        logits: scores, shape (..., C).
        targets: classes, shape (...).
        label_smoothing: share of each target that is spread evenly over all classes. Szegedy et
            al., "Rethinking the Inception architecture", 2016, section 7.

    Returns:
        The sum over all scored targets, and their number.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    scored = targets != IGNORE_INDEX
    classes = jnp.where(scored, targets, 0)
    found = jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0]
    if label_smoothing:
        found = (1.0 - label_smoothing) * found + label_smoothing * jnp.mean(logits, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - found
    return TokenLoss(jnp.sum(jnp.where(scored, losses, 0.0)), jnp.sum(scored))
