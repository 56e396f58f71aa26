"""All levels by name, in the order in which they are climbed."""

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
