"""How a token is chosen from its logits. Read beside torch_gpt/decoding/sampling.py.

Dimension key: B batch, V vocab.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits.

    The filters apply in the order given here, each to what the one before it left.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and needs no key.
        top_k: keeps the k most likely tokens; None keeps all.
        top_p: keeps the fewest most likely tokens whose probabilities add up to at least p, so
            always the first. Holtzman et al., "The curious case of neural text degeneration", 2020.
        min_p: keeps tokens at least p times as likely as the first. Nguyen et al., "Turning up the
            heat: min-p sampling", 2024.

    Raises:
        ValueError: on values outside their range, all problems in one message.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(
                f"temperature is {self.temperature}, it must be finite and not negative"
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            problems.append(f"top_k is {self.top_k!r}, it must be an integer of at least 1 or None")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p is {self.top_p}, it must be in (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            problems.append(f"min_p is {self.min_p}, it must be in [0, 1]")
        if problems:
            raise ValueError(f"Sampling: {'; '.join(problems)}.")


GREEDY = Sampling(temperature=0.0)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Divide logits by the temperature, and set those that a filter drops to -inf.

    Every filter keeps the head of one ranking, in which of equal logits the lower id comes first.

    Args:
        logits_BV: of the next token.
        sampling: a temperature above 0, and what to keep.

    Returns:
        Logits (B, V) in float32 or wider, counted from the highest, which becomes 0.
    """
    given_BV = widened(logits_BV)
    # From the highest, so that no temperature is too low: it stays 0, the others go to -inf. A
    # factor, because XLA makes one of a divisor and torch does not.
    factor = min(1.0 / sampling.temperature, float(jnp.finfo(given_BV.dtype).max))
    logits_BV = (given_BV - jnp.max(given_BV, axis=-1, keepdims=True)) * factor
    if sampling.top_k is not None or sampling.top_p < 1.0:
        num = min(sampling.top_k or given_BV.shape[1], given_BV.shape[1])
        # twin: lax.top_k keeps equals in order, once no zero is negative, and need not sort the
        # rest; torch.topk promises no order.
        ids = jax.lax.top_k(jnp.where(given_BV == 0.0, 0.0, given_BV), num)[1]
        ranked = jnp.take_along_axis(logits_BV, ids, axis=-1)
        if sampling.top_p < 1.0:
            sums = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
            before = jnp.pad(sums[:, :-1], ((0, 0), (1, 0)))
            ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
        none_BV = jnp.full_like(logits_BV, -jnp.inf)
        logits_BV = jnp.put_along_axis(none_BV, ids, ranked, axis=-1, inplace=False)
    if sampling.min_p > 0.0:
        logits_BV = jnp.where(logits_BV >= math.log(sampling.min_p), logits_BV, -jnp.inf)
    return logits_BV


def widened(x: jax.Array) -> jax.Array:
    """Cast scores to float32 at least: 16 bits make ties of what was none."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
