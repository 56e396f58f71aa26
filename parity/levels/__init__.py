"""The rungs of the check, in the order in which they are climbed.

Each level is a module with `records(subject)`, which compares, and `locate(subject, records)`,
which says after a failure where the two models part.
"""

from types import ModuleType

from parity.levels import cache, gradients, logits, optimizer, tokens, trajectory, weights

LEVELS: dict[str, ModuleType] = {
    "weights": weights,
    "logits": logits,
    "gradients": gradients,
    "optimizer": optimizer,
    "trajectory": trajectory,
    "cache": cache,
    "tokens": tokens,
}
