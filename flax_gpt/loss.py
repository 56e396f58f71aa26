"""Next-token cross entropy, with the shift in one place and every token counted.

Read beside torch_gpt/loss.py.

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
        num_tokens: how many tokens were scored.
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
        """exp of the mean over all tokens, never a mean of perplexities."""
        return jnp.exp(self.mean)


def next_token_loss(
    logits_BTV: jax.Array, labels_BT: jax.Array, counts_B: jax.Array | None = None
) -> TokenLoss:
    """Scores logits at t against the label at t + 1, inside each row.

    The shift is here and nowhere else: labels are the tokens themselves, not shifted. The last
    position of a row has nothing to predict and the first label is never predicted.

    Args:
        logits_BTV: from the model, on the same tokens.
        labels_BT: the tokens, with IGNORE_INDEX where a token must not be scored.
        counts_B: real tokens per row, the rest is padding on the right; None for T.
    """
    logits_BTV, targets_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    scored_BT = targets_BT != IGNORE_INDEX
    if counts_B is not None:
        steps_1T = jnp.arange(1, labels_BT.shape[1])[None, :]
        scored_BT = scored_BT & (steps_1T < counts_B[:, None])
    targets_BT = jnp.where(scored_BT, targets_BT, 0)
    target_logits_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logits_BT1[:, :, 0]
    return TokenLoss(jnp.sum(jnp.where(scored_BT, losses_BT, 0.0)), jnp.sum(scored_BT))
